"""Errors that a user can fix."""

__all__ = ['UserError']

_LONGEST = 1500  # characters


class UserError(RuntimeError):
    """What went wrong and what would be right, in one sentence; the command line prints it without a traceback.

    Args:
        message: The sentence. What it quotes of foreign files may be anything: it is kept to one printable line.
    """

    def __init__(self, message: str) -> None:
        text = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in message)
        super().__init__(text if len(text) <= _LONGEST else f'{text[:_LONGEST]} ...')
