"""Errors that a user can mend."""

__all__ = ['UserError']


class UserError(RuntimeError):
    """What went wrong and what would be right, in one sentence; the command line prints it without a traceback."""
