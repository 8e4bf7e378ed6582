"""Report of all GPU measurements: `make gpu-report`."""
