"""Everything that is measured on a GPU, in one report: `make gpu-report`."""
