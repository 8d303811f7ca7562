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

__all__ = ['mutated_list', 'mutated_names', 'mutated_tar', 'mutate_folder', 'write_originals']

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


def _tar(members: list[tarfile.TarInfo] | None = None, fmt: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w', format=fmt) as tar:
        for i, name in enumerate(NAMES):
            member = members[i] if members else tarfile.TarInfo(name)
            data = _image(i)
            member.size = member.size or len(data)
            filled = io.BytesIO(data.ljust(min(member.size, 4096), b'\0'))
            tar.addfile(member, filled if member.isreg() else None)
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


def _senseless_member(rng: Random, member: tarfile.TarInfo) -> None:
    kind = rng.randrange(6)
    if kind == 0:
        member.name = rng.choice((
            f'../{member.name}', f'/tmp/evil/{member.name}', f'a\\{member.name}', word(rng),
            f'{word(rng)}/{member.name}',
            member.name.lower(), f'{rng.choice(SYNSETS)}/{member.name}', f'{"d/" * 500}{member.name}')) or 'x'
    elif kind == 1:
        member.type = rng.choice((
            tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, tarfile.CONTTYPE,
            b'Z'))
        member.linkname = rng.choice(('/etc/passwd', '../../evil', member.name, NAMES[0], ''))
    elif kind == 2:
        member.size = rng.choice((1, 10, 4096, abs(number(rng)) % 8**11))
    elif kind == 3:
        member.pax_headers = {
            rng.choice(('path', 'size', 'GNU.sparse.size', 'GNU.sparse.map', 'linkpath', 'mtime', 'charset')):
            rng.choice((word(rng), str(number(rng)), '0,1,99999999999,1')).replace('\ud800', '')}
    elif kind == 4:
        member.mode, member.uid = rng.choice((0, 0o7777)), rng.choice((0, 2**20))
    else:
        member.mtime = rng.choice((0, 8**11 - 1, -1))


def _flip_header(rng: Random, data: bytes) -> bytes:
    """Change a header block of a tar and make its checksum right again."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        offset = rng.choice(tar.getmembers()).offset
    block = bytearray(data[offset:offset + 512])
    field, size = rng.choice(((0, 100), (124, 12), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
    new = rng.choice((
        rng.randbytes(size), bytes(size), b'\xff' * size, b'\x80' + (abs(number(rng)) % 2**80).to_bytes(11, 'big'),
        b'%011o\0' % (abs(number(rng)) % 8**11), rng.choice((b'S', b'L', b'K', b'x', b'g', b'1', b'5'))))
    block[field:field + len(new)] = new[:512 - field]
    block = block[:512]
    block[148:156] = b' ' * 8
    block[148:156] = b'%06o\0 ' % sum(block)
    return data[:offset] + bytes(block) + data[offset + 512:]


def mutated_tar(rng: Random) -> bytes:
    """Return the bytes of a mutated tar of images, sometimes compressed."""
    kind = rng.randrange(4)
    data = _tar()
    if kind == 0:
        members = [tarfile.TarInfo(name) for name in NAMES]
        for _ in range(rng.choice((1, 1, 3))):
            _senseless_member(rng, rng.choice(members))
        try:
            data = _tar(members, rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)))
        except (ValueError, OSError, UnicodeError):  # tarfile's own writer refuses some
            kind = 2
    if kind == 1:
        for _ in range(rng.choice((1, 1, 4))):
            try:
                data = _flip_header(rng, data)
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
