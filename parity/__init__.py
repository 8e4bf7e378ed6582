"""Weights, conversion and comparison of the two frameworks."""
