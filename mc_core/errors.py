"""The errors that the command turns into one line."""


class UserError(ValueError):
    """Something that whoever started the command can put right: exit code 2."""


class NotFiniteError(ArithmeticError):
    """Training met a NaN or an infinity: exit code 1."""
