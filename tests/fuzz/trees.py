"""Mutated label lists, tars and folders of images for val-tree, and lists of class names for convert."""
import bz2
import gzip
import io
import lzma
import os
import tarfile
from pathlib import Path
from random import Random

from timm.data import ImageNetInfo

from .data import mutate_bytes, number, word

LABELS = (65, 970, 230, 0, 516, 999, 65, 334)
NAMES = [f'ILSVRC2012_val_{i:08d}.JPEG' for i in range(1, 1 + len(LABELS))]
SYNSETS = ImageNetInfo('imagenet-1k').label_names()


def _image(i: int) -> bytes:
    return b'\xff\xd8' + Random(i).randbytes(500 + 37 * i)  # val-tree moves images, it opens none


def _lines() -> list[str]:
    return [f'{name} {label}' for name, label in zip(NAMES, LABELS, strict=True)]


def write_originals(folder: Path) -> None:
    """Write what nothing is wrong with: the folder flat, val.tar and val.txt."""
    (folder / 'flat').mkdir()
    for i, name in enumerate(NAMES):
        (folder / 'flat' / name).write_bytes(_image(i))
    (folder / 'val.tar').write_bytes(_tar())
    (folder / 'val.txt').write_text('\n'.join(_lines()) + '\n')


def _tar(pax_headers: dict[str, str] | None = None, fmt: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w', format=fmt) as tar:
        for i, name in enumerate(NAMES):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = len(_image(i)), pax_headers or {}
            tar.addfile(member, io.BytesIO(_image(i)))
    return buffer.getvalue()


def mutated_list(rng: Random) -> bytes:
    """Return the bytes of a mutated list of NAME LABEL lines."""
    lines = _lines()
    for _ in range(rng.choice((1, 1, 2, 5))):
        i, kind = rng.randrange(len(lines)), rng.randrange(10)
        name, _, label = lines[i].partition(' ')
        lines[i] = (
            f'{name} {number(rng)}', f'{name} {word(rng)}', f'{word(rng)}/{name} {label}', f'{word(rng)}.JPEG {label}',
            f'{rng.choice(SYNSETS)}/{name} {label}', f'{name}\t{label} ', lines[rng.randrange(len(lines))], '',
            f'{name} {rng.choice(("٣", "１", "0x1", "1_0", "+1", "1.0", "0" * 5000 + "1"))}',
            f'{word(rng)} {word(rng)}' * rng.choice((1, 1, 100_000)),
        )[kind]
    text = rng.choice(('\n', '\n', '\n', '\r\n', '\r', '\x85')).join(lines)
    data = text.encode(rng.choice(('utf-8', 'utf-8', 'utf-8', 'utf-8-sig', 'utf-16', 'utf-32')), 'surrogatepass')
    return mutate_bytes(rng, data, _tar()) if rng.random() < .4 else data


def _change_header(rng: Random, data: bytes) -> bytes:
    """Change a header block of a tar and make its checksum right again."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offset = rng.choice(tar.getmembers()).offset
    block = bytearray(data[offset:offset + 512])
    field, size = rng.choice(((0, 100), (0, 100), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
    path = rng.choice((
        f'../{NAMES[0]}', f'/tmp/evil/{NAMES[0]}', f'a\\{NAMES[0]}', word(rng), f'{rng.choice(SYNSETS)}/{NAMES[0]}',
        '/etc/passwd', '../../evil', *NAMES[:2]))
    new = rng.choice((
        rng.randbytes(size), bytes(size), b'\xff' * size, b'\x80' + (abs(number(rng)) % 2**80).to_bytes(11, 'big'),
        b'%011o\0' % (abs(number(rng)) % 8**11), rng.choice(b'0123567SLKxgZ').to_bytes(1, 'big'),
        path.encode('utf-8', 'surrogatepass')))
    block[field:field + size] = new[:size].ljust(size, b'\0')
    block[148:156] = b' ' * 8
    block[148:156] = b'%06o\0 ' % sum(block)
    return data[:offset] + bytes(block) + data[offset + 512:]


def mutated_tar(rng: Random) -> bytes:
    """Return the bytes of a mutated tar of images, sometimes compressed."""
    kind, data = rng.randrange(4), _tar()
    if kind == 0:
        key = rng.choice(('path', 'size', 'GNU.sparse.size', 'GNU.sparse.map', 'linkpath', 'mtime', 'charset'))
        value = rng.choice((word(rng), str(number(rng)), '0,1,99999999999,1')).replace('\ud800', '')
        data = _tar({key: value}, tarfile.PAX_FORMAT)
    if kind == 1:
        for _ in range(rng.choice((1, 1, 4))):
            try:
                data = _change_header(rng, data)
            except Exception:  # a second change of what the first made unreadable
                break
    pack = rng.choice((bytes, bytes, gzip.compress, bz2.compress, lzma.compress))
    if kind == 2 and rng.random() < .5:
        return pack(mutate_bytes(rng, data, _lines()[0].encode()))
    return mutate_bytes(rng, pack(data), data) if kind >= 2 else pack(data)


def mutate_folder(rng: Random, folder: Path) -> None:
    """Put into a folder of images what may lie in one: links and their circles, pipes, other files, other sizes."""
    for _ in range(rng.choice((1, 2, 4))):
        target = folder / rng.choice(NAMES)
        place = folder / rng.choice((
            'a', 'b', 'n01440764', 'x.JPEG', NAMES[1], '.hidden', f'{NAMES[0][:-5]}.jpeg', 'a/b'))
        try:
            _change(rng, folder, target, place)
        except OSError:  # there already, or gone
            pass


def _change(rng: Random, folder: Path, target: Path, place: Path) -> None:
    if not target.is_file() or place.exists() and not place.is_file():
        return  # to write into a pipe would wait for its reader
    rng.choice((
        lambda: target.unlink(), lambda: target.write_bytes(b''), lambda: target.chmod(0),
        lambda: os.symlink(rng.choice(('.', '..', folder, target, '/nowhere', place.name)), place),
        lambda: os.symlink('.', place), lambda: os.symlink('..', place),
        lambda: os.mkfifo(place), lambda: place.mkdir(), lambda: place.write_bytes(_image(1)),
        lambda: target.rename(place), lambda: (target.unlink(), os.mkfifo(target)),
        lambda: (target.unlink(), target.mkdir()), lambda: (target.unlink(), os.symlink(target, target)),
        lambda: (folder / os.fsdecode(b'\xff\xfe.JPEG')).write_bytes(b'x'),
    ))()


def mutated_names(rng: Random, count: int) -> bytes:
    """Return the bytes of a list of class names, one a line."""
    names = [f'class {i}' for i in range(count)]
    for _ in range(rng.choice((0, 1, 3))):
        names[rng.randrange(count)] = rng.choice((
            word(rng), 'x' * 10**6, '---', '"', '[a](b)', '{}', '<b>', '\x1b[31m'))
    text = rng.choice(('\n', '\n', '\r\n', '\u2028')).join(names)
    data = text.encode(rng.choice(('utf-8', 'utf-8', 'utf-8-sig', 'utf-16', 'latin-1')), 'replace')
    return mutate_bytes(rng, data, _tar()) if rng.random() < .3 else data
