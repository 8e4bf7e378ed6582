"""Mutation tests: each fault, injected into the sources, must be caught by a test."""
