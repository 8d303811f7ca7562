"""Classification of image files with a pretrained model."""
import glob
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import tqdm
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from timm.data.readers import get_img_extensions

from ..errors import UserError
from ..models import T2TViT
from .load import load_t2t_vit

__all__ = ['Classified', 'class_names', 'classify', 'find_images', 'image_reader', 'render']

_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)  # Pillow raises these


class Classified(NamedTuple):
    """Results of the images that could be read, and why the others could not."""
    results: list[dict[str, Any]]
    unreadable: dict[str, str]


def find_images(names: list[str]) -> list[str]:
    """Return the files behind names of files, folders (searched recursively) and globs, in order.

    A name that is none of these is returned unchanged, so that opening it fails with a message.
    """
    files = []
    for name in names:
        if os.path.isdir(name):
            extensions = get_img_extensions(as_set=True)
            files += sorted(
                str(p) for p in Path(name).rglob('*') if p.is_file() and p.suffix.lower() in extensions)
        elif not os.path.lexists(name) and glob.has_magic(name):
            files += sorted(p for p in glob.glob(name, recursive=True) if os.path.isfile(p)) or [name]
        else:
            files.append(name)
    return files


def class_names(model: T2TViT) -> list[str]:
    """Return the names that came with the weights, else ImageNet's if their number says so, else numbers."""
    names = model.pretrained_cfg.get('label_names')
    if names is not None:
        return [str(name) for name in names]
    subset = infer_imagenet_subset(model)
    if subset is not None:
        return list(ImageNetInfo(subset).label_descriptions())
    return [f'class {i}' for i in range(model.num_classes)]


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

    def read(file: str) -> torch.Tensor:
        try:
            with Image.open(file) as image:
                return transform(image.convert(mode)).unsqueeze(0)
        except _UNREADABLE as e:
            raise ValueError(getattr(e, 'strerror', None) or str(e) or type(e).__name__) from e

    return read


def classify(names: list[str], model: str = 't2t_vit_14', topk: int = 5) -> Classified:
    """Classify images with a pretrained model and its own preprocessing.

    Args:
        names: Files, folders and globs.
        model: Any name of a T2T-ViT that timm.create_model takes.
        topk: How many classes to give of each image, the most probable first.

    Returns:
        Of each image its name and its classes (index, label, probability), and the files that could not be read.

    Raises:
        UserError: No images, no such model or weights, a model that reads neither 1 nor 3 channels, or topk below 1.
    """
    if topk < 1:
        raise UserError(f'--topk should be 1 or more, not {topk}.')
    files = find_images(names)
    if not files:
        raise UserError(f'There are no images in {", ".join(names)}.')
    if not any(os.path.exists(file) for file in files):  # before weights are fetched
        raise UserError(f'There is no file {", ".join(files)}.')
    net = load_t2t_vit(model)
    if net.num_classes < 1:
        raise UserError(f'{model} has no classifier.')
    labels = class_names(net)
    read = image_reader(net)
    results, unreadable = [], {}
    for file in tqdm(files, unit='image', delay=1, disable=None):
        try:
            x = read(file)
        except ValueError as e:
            unreadable[file] = str(e)
            continue
        with torch.inference_mode():
            probabilities = net(x).softmax(dim=1)[0]
        values, classes = probabilities.topk(min(topk, len(labels)))
        results.append(dict(image=file, classes=[
            dict(index=i, label=labels[i], probability=round(p, 6))
            for p, i in zip(values.tolist(), classes.tolist(), strict=True)]))
    return Classified(results, unreadable)


def render(classified: Classified, as_json: bool = False) -> str:
    """Return the results as text, or as JSON."""
    if as_json:
        return json.dumps(classified.results, indent=2, ensure_ascii=False)
    return '\n'.join(line for result in classified.results for line in [result['image']] + [
        f'  {100 * c["probability"]:5.1f} %  {c["label"]} ({c["index"]})' for c in result['classes']])
