"""Recall tasks as training data: sequences that contain the answers."""
