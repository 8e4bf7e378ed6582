"""Errors that the command line reports on one line."""


class UserError(ValueError):
    """An error that the user can fix: exit code 2."""


class NotFiniteError(ArithmeticError):
    """A NaN or infinity occurred in training: exit code 1."""
