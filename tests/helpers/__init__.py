"""Shared helpers of the tests: inputs, references, runs and commands."""
