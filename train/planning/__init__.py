"""Plans of training steps on machines that are not at hand; see `train.planning.plan`."""
