"""Shared inputs, references, runs and commands of the tests."""
