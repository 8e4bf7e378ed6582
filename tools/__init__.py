"""Tools for developers; no package imports them."""
