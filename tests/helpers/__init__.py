"""What several test files share: inputs, references, runs and commands."""
