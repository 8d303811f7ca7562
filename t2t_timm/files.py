"""Files and folders that appear whole or not at all: written beside their place, then renamed."""
import errno
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory, TemporaryFile
from typing import TextIO

from .errors import UserError

__all__ = [
    'check_new_folder', 'check_parent', 'check_target', 'folder_beside', 'is_part', 'naming', 'new_file', 'new_folder',
    'new_text_file', 'sole_writer',
]

_PART = re.compile(r'\.[0-9a-f]{16}\.part.*')
_FULL = {getattr(errno, name, None) for name in ('ENOSPC', 'EDQUOT', 'EFBIG', 'EIO')}


def is_part(name: str) -> bool:
    """Return True if a file of this name is one that `new_file` was writing when it was killed."""
    return _PART.fullmatch(name) is not None


def check_parent(path: Path) -> None:
    """Raise a UserError if there is no folder to write a file or folder to: parents are never made."""
    if not path.parent.is_dir():
        raise UserError(f'There is no folder {path.parent} to write {path.name} to.')


def check_new_folder(path: Path) -> None:
    """Raise a UserError, before long work begins, if `new_folder` cannot make a folder."""
    check_parent(path)
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f'{path} exists and is not empty: name a new folder, or empty it.')
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f'{path} exists and is not a folder: name a new one.')


def check_target(path: str | Path, *suffixes: str) -> None:
    """Raise a UserError, or an OSError of the system, before long work begins, if a file cannot be written.

    If its name has an end, it has to be one of `suffixes`, of which the first is the usual one.
    """
    path = Path(path)
    check_parent(path)
    if path.is_dir():
        raise UserError(f'{path} is a folder: name a file to write.')
    if path.suffix and path.suffix.lower() not in suffixes:
        raise UserError(f'{path} ends in {path.suffix}, but the file is a {suffixes[0]}.')
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


@contextmanager
def naming(path: Path, part: Path) -> Iterator[None]:
    """Make errors of writing `part` name `path`: the temporary name would tell the user nothing."""
    try:
        yield
    except Exception as e:
        error = e if isinstance(e, OSError) and e.errno is not None else _full_disk(part)
        if error is None or not (
                error.errno in _FULL if error.filename is None else os.fsdecode(error.filename).startswith(str(part))):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from e


def _full_disk(part: Path) -> OSError | None:
    """Return the error of a full disk, which libraries tell of in their own words: write 1 MiB to test."""
    sizes = [p.stat().st_size for p in (part, *part.rglob('*')) if p.is_file()]
    try:
        with TemporaryFile(dir=part if part.is_dir() else part.parent) as file:
            file.seek(max(sizes, default=0))  # a file, too, may have reached its limit
            file.write(bytes(1 << 20))
    except OSError as e:
        return OSError(e.errno, e.strerror)
    return None


@contextmanager
def sole_writer(path: Path) -> Iterator[None]:
    """Keep other commands from writing to a file or folder, by a lock beside it; a UserError says if one is."""
    from huggingface_hub.utils import WeakFileLock  # takes long to import, and some commands lock nothing
    lock = path.with_name(f'.{path.name}.lock')
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(lock, timeout=1))
        except TimeoutError as e:
            raise UserError(f'Another command is writing to {path}: wait until it has ended.') from e
        except PermissionError:  # nothing can be made in the folder that holds `path`, so no lock either
            pass
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes no open file, but then releasing the lock does
                lock.unlink()


@contextmanager
def new_file(path: Path, suffix: str = '') -> Iterator[Path]:
    """Give a path beside `path` to write to; at the end it takes the place of `path`, or goes if anything fails.

    The name to write to ends in `suffix`, for a library that asks for it. An OSError of writing names `path`.
    """
    part = path.with_name(f'.{token_hex(8)}.part{suffix}')
    try:
        with naming(path, part):
            yield part
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def new_text_file(path: str | Path) -> Iterator[TextIO]:
    """Give a text file, in UTF-8, that appears at `path` at the end, or not at all if anything fails."""
    with (
        new_file(Path(path)) as part,
        open(part, 'w', encoding='utf-8', errors='backslashreplace', newline='') as file,
    ):
        yield file


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`, which an OSError of making or filling it names."""
    try:
        folder = TemporaryDirectory(prefix=f'.{path.name}-', dir=path.absolute().parent, ignore_cleanup_errors=True)
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from e
    with folder as tmp, naming(path, Path(tmp)):
        yield Path(tmp)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give a new folder beside `path` to fill; at the end it takes the name of `path`, or goes if anything fails.

    There may be an empty folder at `path`. Errors of making it, as folder_beside's, name `path`.
    """
    with folder_beside(path) as tmp:
        folder = tmp / 'folder'  # not the temporary one itself, which nobody else may read
        folder.mkdir()
        yield folder
        if path.is_dir():
            path.rmdir()
        os.replace(folder, path)
