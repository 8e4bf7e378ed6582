"""A mutation check: faults planted in the sources, one at a time, each to be caught by a test."""
