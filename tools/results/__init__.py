"""Generated tables of docs/results.md: every figure comes from the recorded runs."""
