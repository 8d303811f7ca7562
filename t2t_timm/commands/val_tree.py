"""ImageNet's validation images, as downloaded, sorted into the class folders that timm's validate.py reads."""
import logging
import lzma
import os
import re
import shutil
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from huggingface_hub.utils import tqdm
from timm.data import ImageNetInfo
from timm.data.readers import get_img_extensions

from ..errors import UserError
from ..files import is_part, new_file, new_text_file, sole_writer
from ..weights.names import abbreviate
from .images import walk_files

_logger = logging.getLogger(__name__)

__all__ = ['val_tree']

Problems = dict[str, list[str]]  # cases of each kind

CLASS_MAP = 'class_map.txt'
FORM = '"NAME.JPEG LABEL", labels 0 to 999 in the order of the synsets'
FIRST = 'ilsvrc2012_val_00000001.jpeg'  # 65 in the order of the synsets, 490 in the devkit's, which counts from 1
FROM_1 = " The labels seem to be counted from 1; timm counts from 0, in the order of the synsets, not in the devkit's."

SYNSETS = ImageNetInfo('imagenet-1k').label_names()
EXTENSIONS = get_img_extensions(as_set=True)
SYNSET = re.compile(r'n\d{8}')
NAME = re.compile(r'[^:\x00-\x1f]+')  # a file name on every system
LABEL = re.compile(r'-?[0-9]{1,9}')
# What reading a tar may raise; a header that lacks a number raises ValueError.
DAMAGED = (tarfile.TarError, EOFError, ValueError, OSError, zlib.error, lzma.LZMAError)


class _Line(NamedTuple):
    name: str
    label: int


class _Image(NamedTuple):
    size: int  # in bytes; -1 of what is no regular file
    source: Any  # the folder or tar that it comes from finds it by this


def val_tree(images: str | Path, labels: str | Path, out: str | Path) -> str:
    """Sort validation images into one folder per class, named by synset in timm's order; return what was done, as text.

    Images of a folder are linked to, those of a tar extracted. All is checked first. The tree is made in
    OUT.incomplete, renamed when it is complete; the next run resumes an interrupted one. A tree that has lost
    images gets them back. timm numbers the folders that it finds, so a tree without images of some classes gets a class
    map too.

    Args:
        images: Folder of images, searched to the bottom, or tar of them, compressed or not.
        labels: List of lines 'NAME.JPEG LABEL', labels 0 to 999; NAME may have folders before it.
        out: Folder to make.

    Raises:
        UserError: The list, the images or what is in `out` is not as it should be, or another command is writing there;
            nothing has been written.
        OSError: A file cannot be read or written.
    """
    images, labels, out = Path(images), Path(labels), Path(out)
    listed = _read_list(labels)
    target = out.resolve()  # a link to a folder stays one
    _check_places(images, out, target)
    classes = len({line.label for line in listed.values()})
    with _open_images(images) as place:
        _logger.info(f'Looking for {len(listed):,} images in {images}.')
        wanted, problems = _match(place, listed)
        if problems:
            raise UserError(
                f'Nothing was written, as the images of {images} and {labels} do not match. {_summary(problems)}.')
        target.parent.mkdir(parents=True, exist_ok=True)
        with sole_writer(target):
            is_new = not target.is_dir() or not any(target.iterdir())
            work = target.with_name(f'{target.name}.incomplete') if is_new else target
            missing = _missing(work, wanted)
            if is_new and target.is_dir():
                target.rmdir()  # now, so that it cannot fail at the end
            if missing:
                _logger.info(
                    f'{place.verb} {len(missing):,} images into {work}, {len(wanted) - len(missing):,} are there '
                    'already. After an interruption the same command goes on.')
            for key in tqdm(missing, desc=place.verb, unit='image', delay=1, disable=None):
                (work / key).parent.mkdir(parents=True, exist_ok=True)
                with new_file(work / key) as part:
                    place.write(wanted[key].source, part)
            if classes < len(SYNSETS) and not (work / CLASS_MAP).exists():
                with new_text_file(work / CLASS_MAP) as file:
                    file.writelines(f'{synset}\n' for synset in SYNSETS)
            if is_new:
                os.rename(work, target)
    done = f'{len(missing):,} {place.done}' if missing else 'complete already, nothing to do'
    text = f'{out}: {len(wanted):,} images in {classes:,} of {len(SYNSETS):,} classes, {done}.'
    if classes < len(SYNSETS):
        text += (f'\nNot all classes have images, and timm numbers the folders that it finds: with validate.py use '
                 f'--class-map {out / CLASS_MAP}, or its labels are wrong.')
    return text


def _summary(problems: Problems) -> str:
    return '; '.join(f'{kind}: {len(cases):,} ({abbreviate(cases)})' for kind, cases in problems.items())


def _read_list(file: Path) -> dict[str, _Line]:
    """Return the lines by their names in lower case: some lists say .jpeg where the tar says .JPEG."""
    listed: dict[str, _Line] = {}
    problems: Problems = defaultdict(list)
    try:
        with open(file, encoding='utf-8-sig') as text:
            for number, line in enumerate(text, 1):
                if line.strip():
                    _read_line(line.strip(), f'line {number} {line.strip()[:80]!r}', listed, problems)
    except UnicodeDecodeError as e:
        raise UserError(f'{file} is not a text file: name a file with lines {FORM}.') from e
    if problems or not listed:
        found = {line.label for line in listed.values()}
        from_1 = FROM_1 if 1000 in found and 0 not in found else ''
        raise UserError(f'{file} should have lines {FORM}. {_summary(problems) or "It is empty"}.{from_1}')
    return listed


def _read_line(line: str, case: str, listed: dict[str, _Line], problems: Problems) -> None:
    fields = line.split()
    path = PureWindowsPath(fields[0])  # which takes / and \ alike
    key, folder = path.name.lower(), path.parent.name
    if LABEL.fullmatch(line):
        problems['Lines of labels without names, like those of the devkit'].append(case)
    elif (
            len(fields) != 2 or not LABEL.fullmatch(fields[1]) or not NAME.fullmatch(path.name)
            or path.suffix.lower() not in EXTENSIONS
    ):
        problems['Unreadable lines'].append(case)
    elif key in listed:
        problems['Names listed twice'].append(case)
    else:
        label = int(fields[1])
        listed[key] = _Line(path.name, label)
        if not 0 <= label < len(SYNSETS):
            problems[f'Labels outside 0 to {len(SYNSETS) - 1}'].append(case)
        elif SYNSET.fullmatch(folder) and folder != SYNSETS[label]:
            problems["Labels of another class than the path's"].append(f'{case}, {label} is {SYNSETS[label]}')
        elif key == FIRST and label in (489, 490):
            problems["Labels in the devkit's order"].append(f'{case}, which is 65 in the order of the synsets')


def _check_places(images: Path, out: Path, target: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f'{out} is not a folder: name a new one.')
    # The files are compared, not their names, which may differ in case alone on macOS and Windows.
    if images.is_dir() and any(images.samefile(p) for p in (target, *target.parents) if p.exists()):
        raise UserError(f'{out} lies in {images}, where the images come from: name a folder outside it.')
    if target in (Path.cwd(), *Path.cwd().parents):
        raise UserError(f'{out} contains the current folder: name a new one.')


class _Folder:
    """Images of a folder, which are linked to; copied where links cannot be made."""
    verb, done, lacks = 'Linking', 'linked', 'Missing'

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    def scan(self) -> Iterator[tuple[str, int, Path]]:
        for file in walk_files(self.path):
            yield file.relative_to(self.path).as_posix(), file.stat().st_size if file.is_file() else -1, file

    def write(self, source: Path, part: Path) -> None:
        try:
            os.symlink(os.path.relpath(source, part.parent), part)  # which stays right when both are moved
        except (OSError, NotImplementedError, ValueError) as e:  # ValueError: on another drive of Windows
            if self.done == 'linked':
                _logger.warning(f'Copying, as symbolic links cannot be made here: {e}')
            self.done = 'copied'
            shutil.copyfile(source, part)


class _Tar:
    """Images of a tar, which are extracted."""
    verb, done, lacks = 'Extracting', 'extracted', 'Missing (is the tar complete?)'

    def __init__(self, tar: tarfile.TarFile) -> None:
        self.tar = tar

    def scan(self) -> Iterator[tuple[str, int, tarfile.TarInfo]]:
        for member in self.tar:
            if not member.isdir():
                yield member.name, member.size if member.isreg() else -1, member

    def write(self, source: tarfile.TarInfo, part: Path) -> None:
        data = self.tar.extractfile(source)
        assert data is not None  # scan says of what is no regular file that it is none
        with data, open(part, 'wb') as file:
            shutil.copyfileobj(data, file)


@contextmanager
def _open_images(path: Path) -> Iterator[_Folder | _Tar]:
    if path.is_dir():
        yield _Folder(path)
        return
    try:
        with tarfile.open(path) as tar:
            yield _Tar(tar)
    except DAMAGED as e:
        if isinstance(e, OSError) and e.filename is not None:  # not of the tar
            raise
        raise UserError(
            f'{path} is no readable tar, or it is damaged or cut off: name a folder or a tar of images, or download it '
            f'again ({str(e) or type(e).__name__}).') from e


def _match(place: _Folder | _Tar, listed: dict[str, _Line]) -> tuple[dict[str, _Image], Problems]:
    """Return the listed images by their names in the tree, and what keeps each from being found once, and no other."""
    wanted: dict[str, _Image] = {}
    problems: Problems = defaultdict(list)
    left = dict(listed)
    for name, size, source in tqdm(place.scan(), desc='Looking', unit='file', delay=1, disable=None):
        path = PurePosixPath(name)
        key, folder = path.name.lower(), path.parent.name
        if key in left:
            synset = SYNSETS[left.pop(key).label]
            wanted[f'{synset}/{path.name}'] = _Image(size, source)
            if size <= 0:
                problems['Empty, or no regular file'].append(repr(path.name))
            if SYNSET.fullmatch(folder) and folder != synset:
                problems["In another class's folder"].append(f'{str(path)!r}, in the list {synset}')
        elif key in listed:
            problems['There twice'].append(repr(path.name))
        elif path.suffix.lower() in EXTENSIONS and not path.name.startswith('.'):  # hidden by a system
            problems['Not in the list'].append(repr(path.name))
    if left:
        problems[place.lacks] = [repr(line.name) for line in left.values()]
    return wanted, problems


def _missing(folder: Path, wanted: dict[str, _Image]) -> list[str]:
    """Return what a tree lacks, in the order of wanted; what a killed run was writing is deleted."""
    present, other = set(), []
    for path in folder.rglob('*'):
        key = path.relative_to(folder).as_posix()
        if key in wanted:
            if path.is_file() and path.stat().st_size == wanted[key].size:
                present.add(key)
        elif is_part(path.name):
            path.unlink()
        elif key != CLASS_MAP and (path.is_symlink() or not path.is_dir()):
            other.append(repr(key))
    if other:
        raise UserError(
            f'{folder} has something else in it: take that out, or name a new folder. '
            f'{_summary({"Not of this list and these images": sorted(other)})}.')
    return [key for key in wanted if key not in present]
