"""Memory Caching in JAX/Flax."""
