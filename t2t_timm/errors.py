"""Errors that a user can fix."""
import re

import timm

__all__ = ['UserError', 'require_timm']

_LONGEST = 1500  # characters


class UserError(RuntimeError):
    """What went wrong and what would be right, in one sentence; the command line prints it without a traceback.

    Args:
        message: The sentence. What it quotes of foreign files may be anything: it is kept to one printable line.
    """

    def __init__(self, message: str) -> None:
        text = ''.join(c if c.isprintable() else c.encode('unicode_escape').decode() for c in message)
        super().__init__(text if len(text) <= _LONGEST else f'{text[:_LONGEST]} ...')


def require_timm(version: str, what: str) -> None:
    """Raise a UserError if timm is older than a feature needs.

    Args:
        version: Oldest release of timm that has what the feature needs.
        what: The feature, to begin the sentence with.
    """
    installed, needed = (tuple(map(int, re.findall(r'\d+', v)[:3])) for v in (timm.__version__, version))
    if installed < needed:
        raise UserError(
            f"{what} needs timm {version} or newer, and timm {timm.__version__} is installed: "
            "run pip install --upgrade timm.")
