"""Errors that a user can fix."""
import errno
import os
import re
import unicodedata
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

__all__ = ['UserError', 'file_reason', 'printable', 'require_new_timm', 'suggestion']

_LONGEST = 1500  # characters


def printable(text: str) -> str:
    """Return text whose control characters, line ends and bytes that are not UTF-8 are written as escapes of Python."""
    return ''.join(
        c if c.isprintable() or unicodedata.category(c) == 'Zs' else c.encode('unicode_escape').decode() for c in text)


def suggestion(word: str, words: Iterable[str]) -> str:
    """Return a question for the most similar of `words`, to put behind a sentence, or nothing if there is none."""
    spelt = {w.replace('-', '_'): w for w in words}
    found = get_close_matches(word.lower().replace('-', '_'), spelt, n=3, cutoff=0.75)
    return f' Did you mean {" or ".join(spelt[w] for w in found)}?' if found else ''


class UserError(RuntimeError):
    """What went wrong and what would be right, in one sentence; the command line prints it without a traceback.

    Args:
        message: The sentence. What it quotes of foreign files may be anything: it is kept to one printable line.
    """

    def __init__(self, message: str) -> None:
        text = printable(message)
        super().__init__(text if len(text) <= _LONGEST else f'{text[:_LONGEST]} ...')


def file_reason(e: OSError) -> str:
    """Return which file an error of the system is about and why, and what to set if the home folder is read-only."""
    text, cache = f'{e.filename}: {e.strerror}', Path('~/.cache').expanduser()
    path = Path(os.fsdecode(e.filename))
    in_cache = cache.is_relative_to(path) or path.is_relative_to(cache)
    if in_cache and e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        text += '; set TORCH_HOME and HF_HOME to folders for downloads that you may write to'
    return text


def require_new_timm(what: str) -> None:
    """Raise a UserError if timm is older than 1.0.31; `what` needs that, and begins the sentence."""
    import timm  # not above: the command line imports this file, and answers before timm could be imported
    if tuple(map(int, re.findall(r'\d+', timm.__version__)[:3])) < (1, 0, 31):
        raise UserError(
            f'{what} needs timm 1.0.31 or newer, and timm {timm.__version__} is installed: '
            'run pip install --upgrade timm.')
