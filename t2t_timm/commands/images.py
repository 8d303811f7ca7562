"""Image files: which there are, and how every command reads them."""
import glob
import logging
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config
from timm.data.readers import get_img_extensions

from ..errors import UserError, printable
from ..models import T2TViT

_logger = logging.getLogger(__name__)

__all__ = ['find_images', 'image_reader', 'open_image', 'require_image']

_EXTENSIONS = {'.webp', '.bmp', '.tif', '.tiff', '.gif', '.avif'}  # beside timm's
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)  # Pillow raises these
_SHOWN = 3  # files that a message names


def find_images(names: list[str], warn: bool = True) -> list[str]:
    """Return the files behind names of files, folders (searched recursively) and globs, in order.

    A name that is none of these is returned unchanged, so that opening it fails with a message. What else lies in a
    folder is counted and named in a warning, if wanted.
    """
    extensions = _EXTENSIONS | get_img_extensions(as_set=True)
    files: list[str] = []
    skipped: list[str] = []
    for name in names:
        if os.path.isdir(name):
            for path in sorted(p for p in Path(name).rglob('*') if p.is_file()):
                (files if path.suffix.lower() in extensions else skipped).append(str(path))
        elif not os.path.lexists(name) and glob.has_magic(name):
            files += sorted(p for p in glob.glob(name, recursive=True) if os.path.isfile(p)) or [name]
        else:
            files.append(name)
    if skipped and warn:
        more = ', ...' if len(skipped) > _SHOWN else ''
        _logger.warning(
            f'Skipped {len(skipped)} that {"has" if len(skipped) == 1 else "have"} no extension of an image: '
            f'{", ".join(map(printable, skipped[:_SHOWN]))}{more}.')
    return files


def open_image(file: str) -> Image.Image:
    """Read an image file as browsers show it: turned as its EXIF data say, transparency on white, in RGB.

    Raises:
        ValueError: The file is missing or is no image; the message says why.
    """
    try:
        with Image.open(file) as image:
            image.load()
            try:
                image = ImageOps.exif_transpose(image)
            except Exception:  # EXIF data that are damaged, in whatever way, do not damage the image
                pass
            if image.mode.startswith('I;16'):  # Pillow would take all from 255 up for white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.mode in ('RGBA', 'LA', 'PA', 'RGBa', 'La') or 'transparency' in image.info:
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
            return image.convert('RGB')
    except _UNREADABLE as e:
        raise ValueError(getattr(e, 'strerror', None) or str(e) or type(e).__name__) from e


def require_image(file: str) -> Image.Image:
    """Read an image file as `open_image` does, where a command cannot go on without it.

    Raises:
        UserError: The file cannot be read as an image.
    """
    try:
        return open_image(file)
    except ValueError as e:
        raise UserError(f'{file} cannot be read as an image: {e}') from e


def image_reader(model: T2TViT) -> Callable[[str], torch.Tensor]:
    """Return a function that reads an image file by the model's own preprocessing, at its image size: (1, C, H, W).

    The function raises a ValueError for a file that is no image.

    Raises:
        UserError: The model reads neither 1 nor 3 channels.
    """
    if model.in_chans not in (1, 3):
        raise UserError(f'Image files are read with 1 or 3 channels, but the model reads {model.in_chans}.')
    config = resolve_model_data_config(model, dict(input_size=(model.in_chans, *model.patch_embed.img_size)))
    transform = create_transform(**config, is_training=False)
    mode = 'L' if model.in_chans == 1 else 'RGB'
    return lambda file: transform(open_image(file).convert(mode)).unsqueeze(0)
