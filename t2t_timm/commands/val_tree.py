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
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from huggingface_hub.utils import tqdm
from timm.data import ImageNetInfo
from timm.data.readers import get_img_extensions

from ..errors import UserError
from ..files import is_part, new_file, sole_writer

_logger = logging.getLogger(__name__)

__all__ = ['val_tree']

Problems = dict[str, list[str]]  # cases of each kind

CLASS_MAP = 'class_map.txt'
SUFFIX = '.incomplete'  # end of the name of the folder that becomes the tree
FORM = '"NAME.JPEG LABEL", labels 0 to 999 in the order of the synsets'
DEVKIT_LIST = 'ILSVRC2012_validation_ground_truth.txt'
FIRST = 'ilsvrc2012_val_00000001.jpeg'  # 65 in the order of the synsets, 490 in the devkit's, which counts from 1
FROM_1 = (
    ' The labels seem to be counted from 1; timm counts from 0: if they are in the order of the synsets, subtract 1 '
    "from each; if they are in the devkit's, which is another one, they cannot be used here.")

_SHOWN = 3  # cases of a problem that a message names
_SYNSET = re.compile(r'n\d{8}')
_NAME = re.compile(r'[^/\\:\x00-\x1f]+')  # a file name on every system
_LABEL = re.compile(r'-?[0-9]{1,9}')
# Reading a tar may raise these beside OSError; a header that lacks a number raises ValueError.
_DAMAGED: tuple[type[Exception], ...] = (tarfile.TarError, EOFError, ValueError, zlib.error, lzma.LZMAError)


class _Line(NamedTuple):
    name: str
    label: int


class _Image(NamedTuple):
    name: str  # name of the file, without folders
    size: int  # in bytes
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
    """
    images, labels, out = Path(images), Path(labels), Path(out)
    synsets = ImageNetInfo('imagenet-1k').label_names()
    listed = _read_list(labels, synsets)
    _check_places(images, out)
    target = out.resolve()  # a link to a folder stays one
    classes = len({line.label for line in listed.values()})
    with _open_images(images) as place:
        found = _match(place, listed, synsets, labels)
        wanted = {f'{synsets[listed[key].label]}/{image.name}': image for key, image in found.items()}
        target.parent.mkdir(parents=True, exist_ok=True)
        with sole_writer(target):
            work = target if target.is_dir() and any(target.iterdir()) else target.with_name(target.name + SUFFIX)
            missing = _missing(work, wanted)
            if work != target:
                _make_room(out, target)
            if missing:
                _logger.info(
                    f'{place.verb} {len(missing):,} images into {work}, {len(wanted) - len(missing):,} are there '
                    'already. After an interruption the same command goes on.')
                _fill(work, wanted, missing, place)
            if classes < len(synsets):
                _write_class_map(work, synsets)
            if work != target:
                os.rename(work, target)
    done = f'{len(missing):,} {place.done}' if missing else 'complete already, nothing to do'
    text = f'{out}: {len(wanted):,} images in {classes:,} of {len(synsets):,} classes, {done}.'
    if classes < len(synsets):
        text += (f'\nNot all classes have images, and timm numbers the folders that it finds: with validate.py use '
                 f'--class-map {out / CLASS_MAP}, or its labels are wrong.')
    return text


def _summary(problems: Problems) -> str:
    return '; '.join(
        f'{kind}: {len(cases):,} ({", ".join(cases[:_SHOWN])}{", ..." if len(cases) > _SHOWN else ""})'
        for kind, cases in problems.items())


def _read_list(file: Path, synsets: list[str]) -> dict[str, _Line]:
    """Return the lines by their names in lower case: some lists say .jpeg where the tar says .JPEG."""
    if not file.is_file():
        raise UserError(f'{file} is {"no file" if file.exists() else "not there"}: name a list of lines {FORM}.')
    listed: dict[str, _Line] = {}
    problems: Problems = defaultdict(list)
    bare = count = 0
    try:
        with open(file, encoding='utf-8-sig') as lines:
            for number, line in enumerate(lines, 1):
                fields = line.split()
                count += bool(fields)
                bare += len(fields) == 1 and bool(_LABEL.fullmatch(fields[0]))
                if fields:
                    _read_line(fields, f'line {number} {line.strip()[:80]!r}', listed, problems, synsets)
    except UnicodeDecodeError as e:
        raise UserError(f'{file} is not a text file: name a file with lines {FORM}.') from e
    if bare and bare == count:
        raise UserError(
            f'{file} has labels without names, like the {DEVKIT_LIST} of the devkit, which numbers the classes in '
            f'another order: name a list of lines {FORM}.')
    if not count:
        raise UserError(f'{file} is empty: name a list of lines {FORM}.')
    if listed.get(FIRST, _Line(FIRST, 65)).label in (489, 490):
        raise UserError(
            f"{file} numbers the classes in the devkit's order: ILSVRC2012_val_00000001.JPEG is 65 in the order of the "
            f'synsets, which timm has. Name a list of lines {FORM}.')
    if problems:
        labels = {line.label for line in listed.values()}
        from_1 = FROM_1 if 1000 in labels and 0 not in labels else ''
        raise UserError(f'{file} should have lines {FORM}. {_summary(problems)}.{from_1}')
    return listed


def _read_line(
        fields: list[str],
        case: str,
        listed: dict[str, _Line],
        problems: Problems,
        synsets: list[str],
) -> None:
    parts = re.split(r'[/\\]', fields[0])
    if (
            len(fields) != 2 or not _LABEL.fullmatch(fields[1]) or not _NAME.fullmatch(parts[-1])
            or os.path.splitext(parts[-1])[1].lower() not in get_img_extensions(as_set=True)
    ):
        problems['Unreadable lines'].append(case)
        return
    key, label = parts[-1].lower(), int(fields[1])
    if key in listed:
        problems['Names listed twice'].append(case)
        return
    listed[key] = _Line(parts[-1], label)
    folder = parts[-2] if len(parts) > 1 else ''
    if not 0 <= label < len(synsets):
        problems[f'Labels outside 0 to {len(synsets) - 1}'].append(case)
    elif _SYNSET.fullmatch(folder) and folder != synsets[label]:
        problems["Labels of another class than the path's"].append(f'{case}, {label} is {synsets[label]}')


def _check_places(images: Path, out: Path) -> None:
    if not images.exists():
        raise UserError(f'{images} is not there: name a folder or a tar of images.')
    if out.exists() and not out.is_dir():
        raise UserError(f'{out} is not a folder: name a new one.')
    target = out.resolve()
    if images.is_dir() and _is_within(target, images):
        raise UserError(f'{out} lies in {images}, where the images come from: name a folder outside it.')
    if target.is_dir() and _is_within(Path.cwd(), target):
        raise UserError(f'{out} contains the current folder: name a new one.')


def _is_within(path: Path, folder: Path) -> bool:
    # The files are compared, not their names, which may differ in case alone on macOS and Windows.
    return any(folder.samefile(p) for p in (path, *path.parents) if p.exists())


class _Folder:
    """Images of a folder, which are linked to; copied where links cannot be made."""
    verb, done, lacks = 'Linking', 'linked', 'Missing'

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    def scan(self) -> Iterator[tuple[str, int, Path]]:
        seen = set()
        for folder, folders, files in os.walk(self.path, followlinks=True):
            real = os.path.realpath(folder)
            if real in seen:  # a link may lead in a circle
                folders.clear()
                continue
            seen.add(real)
            for file in map(Path(folder).joinpath, files):
                yield file.relative_to(self.path).as_posix(), file.stat().st_size if file.is_file() else -1, file

    def write(self, source: Path, part: Path) -> None:
        if self.done == 'linked':
            text: str | Path
            try:  # a relative one stays right when both folders are moved, or mounted elsewhere
                text = os.path.relpath(source, part.parent)
            except ValueError:  # on another drive
                text = source
            try:
                os.symlink(text, part)
                return
            except (OSError, NotImplementedError) as e:
                _logger.warning(f'Copying, as symbolic links cannot be made here: {e}')
                self.done = 'copied'
        shutil.copyfile(source, part)


class _Tar:
    """Images of a tar, which are extracted."""
    verb, done, lacks = 'Extracting', 'extracted', 'Missing (is the tar complete?)'

    def __init__(self, path: Path, tar: tarfile.TarFile) -> None:
        self.path = path
        self.tar = tar

    @contextmanager
    def _undamaged(self, *more: type[Exception]) -> Iterator[None]:
        try:
            yield
        except (*_DAMAGED, *more) as e:
            raise UserError(
                f'{self.path} is damaged or cut off, download it again: '
                f'{str(e) or type(e).__name__}') from e

    def scan(self) -> Iterator[tuple[str, int, tarfile.TarInfo]]:
        with self._undamaged(OSError):
            for member in self.tar:
                if not member.isdir():
                    yield member.name, member.size if member.isreg() else -1, member

    def write(self, source: tarfile.TarInfo, part: Path) -> None:
        data = self.tar.extractfile(source)
        assert data is not None  # scan says of what is no regular file that it is none
        with self._undamaged(), data, open(part, 'wb') as file:
            shutil.copyfileobj(data, file)


@contextmanager
def _open_tar(path: Path) -> Iterator[_Tar]:
    try:
        tar = tarfile.open(path)
    except _DAMAGED as e:
        raise UserError(f'{path} is neither a folder nor a readable tar: name a folder or a tar of images.') from e
    with tar:
        yield _Tar(path, tar)


def _open_images(path: Path) -> AbstractContextManager[_Folder | _Tar]:
    return nullcontext(_Folder(path)) if path.is_dir() else _open_tar(path)


def _match(
        place: _Folder | _Tar,
        listed: dict[str, _Line],
        synsets: list[str],
        labels: Path,
) -> dict[str, _Image]:
    """Find each listed image, once, and no other."""
    found, problems = {}, defaultdict(list)
    _logger.info(f'Looking for {len(listed):,} images in {place.path}.')
    with tqdm(total=len(listed), desc='Looking', unit='image', delay=1, disable=None) as progress:
        for name, size, source in place.scan():
            path = PurePosixPath(name)
            key, folder = path.name.lower(), path.parent.name
            if key not in listed:
                # other files may lie there, as may what systems hide
                if path.suffix.lower() in get_img_extensions(as_set=True) and not path.name.startswith('.'):
                    problems['Not in the list'].append(repr(path.name))
            elif key in found:
                problems['There twice'].append(repr(path.name))
            else:
                progress.update()
                found[key] = _Image(path.name, size, source)
                if size <= 0:
                    problems['Empty, or no regular file'].append(repr(path.name))
                if _SYNSET.fullmatch(folder) and folder != synsets[listed[key].label]:
                    problems["In another class's folder"].append(
                        f'{str(path)!r}, in the list {synsets[listed[key].label]}')
    missing = [repr(line.name) for key, line in listed.items() if key not in found]
    if missing:
        problems[place.lacks] = missing
    if problems:
        raise UserError(
            f'Nothing was written, as the images of {place.path} and {labels} do not match. {_summary(problems)}.')
    return found


def _missing(folder: Path, wanted: dict[str, _Image]) -> list[str]:
    """Return what a tree lacks, in the order of wanted; what a killed run was writing is deleted.

    Raises:
        UserError: It has something else in it.
    """
    present, other = set(), []
    for root, dirs, files in os.walk(folder):
        links = [name for name in dirs if os.path.islink(os.path.join(root, name))]  # folders would lead elsewhere
        for path in map(Path(root).joinpath, files + links):
            key = path.relative_to(folder).as_posix()
            if key in wanted:
                if path.is_file() and path.stat().st_size == wanted[key].size:
                    present.add(key)
            elif is_part(path.name):
                path.unlink()
            elif key != CLASS_MAP:
                other.append(repr(key))
    if other:
        raise UserError(
            f'{folder} has something else in it: take that out, or name a new folder. '
            f'{_summary({"Not of this list and these images": sorted(other)})}.')
    return [key for key in wanted if key not in present]


def _make_room(out: Path, target: Path) -> None:
    """Remove an empty folder in the way now, so that it cannot fail at the end."""
    if target.is_dir() and not any(target.iterdir()):
        try:
            target.rmdir()
        except OSError as e:
            raise UserError(f'{out} cannot be replaced ({e.strerror}): name a folder in it that does not exist.') from e


def _fill(work: Path, wanted: dict[str, _Image], missing: list[str], place: _Folder | _Tar) -> None:
    with tqdm(
            total=len(wanted), initial=len(wanted) - len(missing), desc=place.verb, unit='image', delay=1, disable=None,
    ) as progress:
        for key in missing:
            (work / key).parent.mkdir(parents=True, exist_ok=True)
            with new_file(work / key) as part:
                place.write(wanted[key].source, part)
                if part.stat().st_size != wanted[key].size:
                    raise UserError(f'{wanted[key].name} changed while it was read: run the same command again.')
            progress.update()


def _write_class_map(work: Path, synsets: list[str]) -> None:
    path, text = work / CLASS_MAP, ''.join(f'{synset}\n' for synset in synsets)
    if not path.is_file() or path.read_text(encoding='utf-8') != text:
        with new_file(path) as part:
            part.write_text(text, encoding='utf-8', newline='\n')
