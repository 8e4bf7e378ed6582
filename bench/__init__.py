"""Measurements of speed and memory, for `mc bench`."""
