"""Image files: which there are, and how every command reads them."""
import glob
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config
from timm.data.readers import get_img_extensions

from ..errors import UserError, printable
from ..models import T2TViT
from ..weights.names import abbreviate

_logger = logging.getLogger(__name__)

__all__ = ['ImageReader', 'find_images', 'open_image', 'walk_files']

EXTENSIONS = {'.webp', '.bmp', '.tif', '.tiff', '.gif', '.avif'}  # beside timm's
BITS, PHOTOMETRIC = 258, 262  # tags of TIFF
BLACK, WHITE = (280, 340), (281, 341)  # MinSampleValue and MaxSampleValue, also as TIFF has them for signed or float


def find_images(names: list[str]) -> list[str]:
    """Return the files behind names of files, folders (searched recursively) and globs, in order.

    A name that is none of these is returned unchanged, so that opening it fails with a message; so are broken links
    and what may not be looked at inside a folder. What else lies there is counted and named in a warning.
    """
    extensions = EXTENSIONS | get_img_extensions(as_set=True)
    files: list[str] = []
    skipped: list[str] = []
    for name in names:
        if os.path.isdir(name):
            for path in sorted(walk_files(name)):
                if os.path.isfile(path) or not os.path.exists(path):  # no socket, pipe or device
                    (files if path.suffix.lower() in extensions else skipped).append(str(path))
        elif not os.path.lexists(name) and glob.has_magic(name):
            files += sorted(p for p in glob.glob(name, recursive=True) if not os.path.isdir(p)) or [name]
        else:
            files.append(name)
    if skipped:
        _logger.warning(
            f'Skipped {len(skipped)} that {"has" if len(skipped) == 1 else "have"} no extension of an image: '
            f'{printable(abbreviate(skipped))}.')
    return files


def walk_files(folder: str | Path) -> Iterator[Path]:
    """Give all below a folder that is no folder; links to folders are followed, to each one once."""
    def warn(e: OSError) -> None:
        _logger.warning(f'{printable(str(e.filename))} is left out: {e.strerror}.')

    seen = set()
    for root, folders, files in os.walk(folder, onerror=warn, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:  # a link may lead in a circle
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from map(Path(root).joinpath, files)


@contextmanager
def _as_value_error() -> Iterator[None]:
    # Pillow raises nearly anything for a damaged file, and no image may keep the others from being read.
    try:
        yield
    except MemoryError as e:
        raise ValueError('there is not enough memory for it') from e
    except Exception as e:
        raise ValueError(getattr(e, 'strerror', None) or str(e) or type(e).__name__) from e


def open_image(file: str) -> Image.Image:
    """Read an image file as browsers show it: turned as its EXIF data say, transparency on white, in RGB.

    Values of more than 8 bits are scaled to 8 bits: from 0 to the largest that the format has or, in a TIFF, from
    MinSampleValue to MaxSampleValue where they are given.

    Raises:
        ValueError: The file is missing or is no image, or nothing says which of its values is white; the message says
            why.
    """
    with _as_value_error(), Image.open(file) as source:
        colour_of_16_bits = any(';16' in str(tile[3]) for tile in source.tile) and not _is_deep(source)
        source.load()
        with suppress(Exception):  # EXIF data that are damaged, in whatever way, do not damage the image
            ImageOps.exif_transpose(source, in_place=True)
        if colour_of_16_bits:  # of which Pillow reads the upper 8 alone
            largest = int(np.asarray(source.convert('RGB')).max())
            if 0 < largest < 16:
                raise _too_dark(largest * 257)
            if (_tag(source, *WHITE) or 65535.) < 65535.:
                raise ValueError('its colours do not fill 16 bits, of which the upper 8 are read: scale its values')
        image = _to_8_bits(source) if _is_deep(source) else source
        if image.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La') or 'transparency' in image.info:
            image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
        return image.convert('RGB')


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ('I', 'F') or image.mode.startswith('I;16')


def _tag(source: Image.Image, *tags: int) -> float | None:
    """Return the largest value of the first of some tags that an image has; only a TIFF has any."""
    known = getattr(source, 'tag_v2', {})
    return next((float(np.max(known[tag])) for tag in tags if tag in known), None)


def _to_8_bits(source: Image.Image) -> Image.Image:
    """Scale grey values of more than 8 bits, of which Pillow itself would take all from 255 up for white."""
    values, white, black = np.asarray(source), _tag(source, *WHITE), 0.
    if white is not None:
        black = _tag(source, *BLACK) or 0.
    elif _tag(source, BITS) == 12:
        white = 4095.
    elif source.mode == 'F' or source.mode == 'I' and source.format not in ('PNG', 'PPM'):  # those have 16 bits
        raise ValueError(
            'its values are integers of 32 bits, signed ones or floating-point numbers, and nothing says which of them '
            'is white: save it with 8 or 16 bits, or as a TIFF with the tag MaxSampleValue')
    else:
        white = 65535.
        if 0 < values.max() < 4096:
            raise _too_dark(int(values.max()))
    if not white > black:
        raise ValueError(f'its tags say that {black:g} is black and {white:g} white')
    if not np.isfinite(values).all():
        raise ValueError('it has values that are not finite')
    levels = (values.astype(np.float64) - black) * 256 / (white - black + (source.mode != 'F'))
    grey = levels.clip(0, 255).astype(np.uint8)
    return Image.fromarray(255 - grey if _tag(source, PHOTOMETRIC) == 0 else grey)  # Pillow inverts 8 bits alone


def _too_dark(largest: int) -> ValueError:
    return ValueError(
        f'its largest value is {largest:,} of 65,535, so that it would be nearly black: if it has fewer bits than 16, '
        'scale its values, or save it as a grey TIFF with the tag MaxSampleValue')


class ImageReader:
    """Reads image files by timm's transform of a model's own preprocessing, at the model's image size.

    It can be sent to other processes. Called with a file, it returns the model's input, (1, C, H, W).

    Args:
        model: Model that the images are for.

    Attributes:
        mode: Pillow's name of the model's colour channels.

    Raises:
        UserError: The model reads neither 1 nor 3 channels.
    """

    def __init__(self, model: T2TViT) -> None:
        if model.in_chans not in (1, 3):
            raise UserError(f'Image files are read with 1 or 3 channels, but the model reads {model.in_chans}.')
        size = model.patch_embed.img_size
        config = resolve_model_data_config(model, dict(input_size=(model.in_chans, *size)))
        self.mode = 'L' if model.in_chans == 1 else 'RGB'
        self._transform = create_transform(**config, is_training=False, use_prefetcher=True)  # without normalization
        mean, std = (torch.tensor(config[k]) for k in ('mean', 'std'))
        if len(mean) != model.in_chans:  # of colours, for grey images: their average, as timm's loader has it
            mean, std = mean.mean(), std.mean()
        self._mean, self._std = mean.reshape(-1, 1, 1), std.reshape(-1, 1, 1)
        self._height, self._width = (math.floor(s / config['crop_pct']) for s in size)
        self._keeps_ratio = config['crop_mode'] not in ('squash', 'border')  # and resizes the shorter side to these

    def __call__(self, file: str) -> torch.Tensor:
        return self.normalize(self.pixels(file).unsqueeze(0))

    def pixels(self, file: str) -> torch.Tensor:
        """Return an image of the model's size, (C, H, W), in uint8.

        Raises:
            ValueError: The file is no image, or would have more pixels than Pillow opens after it was resized.
        """
        image = open_image(file)
        with _as_value_error():
            limit = Image.MAX_IMAGE_PIXELS and 2 * Image.MAX_IMAGE_PIXELS  # Pillow opens none with more
            ratio = max(self._height / image.height, self._width / image.width)
            width, height = round(ratio * image.width), round(ratio * image.height)
            if self._keeps_ratio and limit and width * height > limit:
                raise ValueError(
                    f'it has {image.width:,} x {image.height:,} pixels (width x height) and would be resized to '
                    f'{width:,} x {height:,}, over the limit of {limit:,} in all: crop it')
            return self._transform(image.convert(self.mode))

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the model's input, (B, C, H, W) in float32, of pixels on any device."""
        mean, std = (t.to(pixels.device) for t in (self._mean, self._std))
        return pixels.float().div_(255).sub(mean).div_(std)
