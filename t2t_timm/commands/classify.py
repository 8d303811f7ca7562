"""Classification of image files with a pretrained model."""
import json
import os
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import tqdm
from timm.data import ImageNetInfo, infer_imagenet_subset

from ..errors import UserError
from ..models import T2TViT
from .images import find_images, image_reader
from .load import load_t2t_vit

__all__ = ['Classified', 'class_names', 'classify', 'render']


class Classified(NamedTuple):
    """Results of the images that could be read, and why the others could not."""
    results: list[dict[str, Any]]
    unreadable: dict[str, str]


def class_names(model: T2TViT) -> list[str]:
    """Return the names that came with the weights, else ImageNet's if their number says so, else numbers."""
    names = model.pretrained_cfg.get('label_names')
    if names is not None:
        return [str(name) for name in names]
    subset = infer_imagenet_subset(model)
    if subset is not None:
        return list(ImageNetInfo(subset).label_descriptions())
    return [f'class {i}' for i in range(model.num_classes)]


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
