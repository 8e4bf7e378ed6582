"""The command line `mc`: one module per group of commands."""

from train.cli.app import main

__all__ = ["main"]
