"""Training: data, optimiser, checkpoints, the loop and the `mc` command."""
