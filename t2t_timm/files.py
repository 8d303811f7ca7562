"""Files and folders that appear whole or not at all: written beside their place, then renamed."""
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory

__all__ = ['folder_beside', 'is_part', 'new_file', 'new_folder']

_PART = re.compile(r'\.[0-9a-f]{16}\.part.*')


def is_part(name: str) -> bool:
    """Return True if a file of this name is one that `new_file` was writing when it was killed."""
    return _PART.fullmatch(name) is not None


@contextmanager
def new_file(path: Path, suffix: str = '') -> Iterator[Path]:
    """Give a path beside `path` to write to; at the end it takes the place of `path`, or goes if anything fails.

    Args:
        path: File to make or to replace.
        suffix: What the name of the file to write to has to end in, for a library that asks for it.
    """
    part = path.with_name(f'.{token_hex(8)}.part{suffix}')
    try:
        yield part
        os.replace(part, path)
    except OSError as e:
        if e.filename != str(part):
            raise
        raise OSError(e.errno, e.strerror, str(path)) from e
    finally:
        part.unlink(missing_ok=True)


def folder_beside(path: Path) -> TemporaryDirectory:
    """Make a temporary folder beside `path`.

    Raises:
        OSError: It cannot be made; the error names `path`, as the temporary name would tell the user nothing.
    """
    try:
        return TemporaryDirectory(
            prefix=f'.{path.name}-', dir=path.absolute().parent, ignore_cleanup_errors=True)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a new folder beside `path` to fill; at the end it takes the name of `path`, or goes if anything fails.

    Args:
        path: Folder to make; may exist if it is empty.

    Raises:
        OSError: There is no folder to make it in, or it exists and is not empty.
    """
    with folder_beside(path) as tmp:
        folder = Path(tmp) / 'folder'  # not the temporary one itself, which nobody else may read
        folder.mkdir()
        yield folder
        if path.is_dir():
            path.rmdir()
        os.replace(folder, path)
