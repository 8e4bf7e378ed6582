"""Training tasks: text and recall."""
