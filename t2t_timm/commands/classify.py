"""Classification of image files with a pretrained model."""
import csv
import io
import json
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

import torch
from huggingface_hub.utils import tqdm
from timm.data import ImageNetInfo, infer_imagenet_subset

from ..errors import UserError, printable
from ..models import T2TViT
from .images import find_images, image_reader
from .load import load_t2t_vit

__all__ = ['class_names', 'classify', 'write_results']


def class_names(model: T2TViT) -> list[str]:
    """Return the names that came with the weights, else ImageNet's if their number says so, else numbers."""
    names = model.pretrained_cfg.get('label_names')
    if names is not None and len(names) == model.num_classes:  # Transformers keeps those of before a fine-tuning
        return [str(name) for name in names]
    subset = infer_imagenet_subset(model)
    if subset is not None:
        return list(ImageNetInfo(subset).label_descriptions())
    return [f'class {i}' for i in range(model.num_classes)]


def classify(
        names: list[str],
        model: str = 't2t_vit_14',
        topk: int = 5,
        batch_size: int = 16,
        device: str = 'cpu',
        progress: bool = False,
        **kwargs: Any,
) -> Iterator[dict[str, Any]]:
    """Classify images with a pretrained model and its own preprocessing.

    Args:
        names: Files, folders and globs.
        model: Any name of a T2T-ViT that timm.create_model takes.
        topk: How many classes to give of each image, the most probable first.
        batch_size: Images that the model gets at a time.
        device: Device to compute on.
        progress: Show a bar, if there is a terminal.
        **kwargs: Further arguments of timm.create_model.

    Returns:
        An iterator that gives, of each file, the image's name and its classes (index, label, probability), or in their
        place the error that says why it could not be read.

    Raises:
        UserError: No images, no such model, weights or device, a model that reads neither 1 nor 3 channels, a topk or
            batch_size below 1; from the iterator, probabilities that are not finite.
    """
    for option, value in (('--topk', topk), ('--batch-size', batch_size)):
        if value < 1:
            raise UserError(f'{option} should be 1 or more, not {value}.')
    files = find_images(names)
    if not files:
        raise UserError(f'There are no images in {", ".join(names)}.')
    if not any(os.path.exists(file) for file in files):  # before weights are fetched
        raise UserError(f'There is no file {", ".join(files)}.')
    try:
        torch.empty(0, device=device)
    except Exception as e:  # each kind of device has errors of its own
        raise UserError(f'--device {device} cannot be used: {str(e).splitlines()[0]}') from e
    net = load_t2t_vit(model, **kwargs).to(device)
    if net.num_classes < 1:
        raise UserError(f'{model} has no classifier.')
    return _classify(net, image_reader(net), files, topk, batch_size, progress)


def _classify(
        model: T2TViT,
        read: Callable[[str], torch.Tensor],
        files: list[str],
        topk: int,
        batch_size: int,
        progress: bool,
) -> Iterator[dict[str, Any]]:
    labels, device = class_names(model), next(model.parameters()).device
    bar = tqdm(total=len(files), unit='image', delay=1, disable=None if progress else True)
    for start in range(0, len(files), batch_size):
        images = {}
        for file in files[start:start + batch_size]:
            try:
                images[file] = read(file)
            except ValueError as e:
                yield dict(image=file, error=str(e))
            bar.update()
        if not images:
            continue
        with torch.inference_mode():
            probabilities = model(torch.cat(list(images.values())).to(device)).softmax(dim=1).cpu()
        if not probabilities.isfinite().all():
            raise UserError('The probabilities are not finite numbers: the weights are damaged.')
        values, indices = probabilities.topk(min(topk, len(labels)))
        for file, row, classes in zip(images, values.tolist(), indices.tolist(), strict=True):
            yield dict(image=file, classes=[
                dict(index=i, label=labels[i], probability=round(p, 6)) for p, i in zip(row, classes, strict=True)])
    bar.close()


def write_results(results: Iterable[dict[str, Any]], form: str, file: TextIO) -> int:
    """Write results as they come, and what could not be read to stderr; return 1 if that was any, else 0.

    Args:
        results: What `classify` gives.
        form: 'text', 'json' or 'csv'. Text and CSV have control characters of names as escapes; JSON is ASCII.
        file: File to write to.
    """
    write, code, first = _WRITERS[form], 0, True
    for result in results:
        if 'error' in result:
            print(f'{printable(result["image"])}: cannot be read: {printable(result["error"])}', file=sys.stderr)
            code = 1
            continue
        file.write(write(result, first))
        file.flush()
        first = False
    if form == 'json':
        file.write('[]\n' if first else '\n]\n')
    return code


def _text(result: dict[str, Any], first: bool) -> str:
    lines = [f'  {100 * c["probability"]:5.1f} %  {c["label"]} ({c["index"]})' for c in result['classes']]
    return ''.join(f'{printable(line)}\n' for line in [result['image'], *lines])


def _json(result: dict[str, Any], first: bool) -> str:
    return ('[\n' if first else ',\n') + textwrap.indent(json.dumps(result, indent=2), '  ')


def _csv(result: dict[str, Any], first: bool) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    if first:
        writer.writerow(['image', 'rank', 'index', 'label', 'probability'])
    for rank, c in enumerate(result['classes'], 1):
        writer.writerow(
            [printable(result['image']), rank, c['index'], printable(c['label']), f'{c["probability"]:.6f}'])
    return text.getvalue()


_WRITERS = {'text': _text, 'json': _json, 'csv': _csv}
