"""One file a memory kind."""
