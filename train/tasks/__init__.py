"""Recall tasks as training data: sequences whose answers stand in the sequence itself."""
