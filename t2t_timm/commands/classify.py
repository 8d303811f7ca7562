"""Classification of image files with a pretrained model."""
import os
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from huggingface_hub.utils import tqdm
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch.utils.data import DataLoader

from ..errors import UserError
from ..models import T2TViT
from .images import ImageReader, find_images
from .load import load_t2t_vit

__all__ = ['class_names', 'classify']


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
        workers: int = 0,
        amp: torch.dtype | None = None,
        embeddings: bool = False,
        skip: Iterable[str] = (),
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
        workers: Processes that read images; 0 reads them in this one.
        amp: Lower precision of autocast; None computes in float32.
        embeddings: Give the vector of pooled features too, which the classifier reads; a model may then have none.
        skip: Files to leave out, each as often as it is named.
        **kwargs: Further arguments of timm.create_model.

    Returns:
        An iterator that gives, of each file, the image's name and its classes (index, label, probability) and, if
        wanted, its embedding, or in their place the error that says why it could not be read.

    Raises:
        UserError: No images, no such model, weights or device, a model that reads neither 1 nor 3 channels, a topk or
            batch_size below 1; from the iterator, probabilities that are not finite, or a worker that was killed.
    """
    for option, value, least in (('--topk', topk, 1), ('--batch-size', batch_size, 1), ('--workers', workers, 0)):
        if value < least:
            raise UserError(f'{option} should be {least} or more, not {value}.')
    files = find_images(names)
    if not files:
        raise UserError(f'There are no images in {", ".join(names)}.')
    if not any(os.path.exists(file) for file in files):  # before weights are fetched
        raise UserError(f'There is no file {", ".join(files)}.')
    files = [*(Counter(files) - Counter(skip)).elements()]
    if not files:
        return iter(())
    try:
        with _autocast(torch.device(device), amp):
            torch.zeros(1, device=device).item()  # a device of no values has none to give
    except Exception as e:  # each kind of device has errors of its own
        raise UserError(f'--device {device} cannot be used: {str(e).splitlines()[0]}') from e
    net = load_t2t_vit(model, **kwargs).to(device)
    if net.num_classes < 1 and not embeddings:
        raise UserError(f'{model} has no classifier.')
    reader = ImageReader(net)
    loader: DataLoader = DataLoader(
        files, batch_size, num_workers=workers,  # type: ignore[arg-type]  # a list is a dataset
        collate_fn=partial(_read, reader), worker_init_fn=_ignore_ctrl_c,
        pin_memory=torch.device(device).type == 'cuda')
    bar = tqdm(total=len(files), unit='image', delay=1, disable=None if progress else True)
    return _classify(net, reader, loader, bar, topk, amp, embeddings)


def _autocast(device: torch.device, amp: torch.dtype | None) -> AbstractContextManager:
    return nullcontext() if amp is None else torch.autocast(device.type, amp)  # not every device has it


def _read(reader: ImageReader, files: list[str]) -> tuple[list[str], torch.Tensor | None, list[dict[str, Any]]]:
    """Return the files that could be read, their pixels, and the results of the others."""
    pixels, errors = {}, []
    for i, file in enumerate(files):
        try:
            pixels[i] = reader.pixels(file)
        except ValueError as e:
            errors.append(dict(image=file, error=str(e)))
    return [files[i] for i in pixels], torch.stack([*pixels.values()]) if pixels else None, errors


def _ignore_ctrl_c(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the process that computes ends them


def _batches(loader: DataLoader) -> Iterator[Any]:
    try:
        yield from loader
    except RuntimeError as e:
        if 'DataLoader worker' not in str(e):
            raise
        raise UserError(
            f'A process that reads images has ended ({e}), perhaps for lack of memory: use fewer --workers or a '
            'smaller --batch-size.') from e


def _classify(
        model: T2TViT,
        reader: ImageReader,
        loader: DataLoader,
        bar: Any,
        topk: int,
        amp: torch.dtype | None,
        embeddings: bool,
) -> Iterator[dict[str, Any]]:
    labels, device = class_names(model), next(model.parameters()).device
    head, model.head = model.get_classifier(), nn.Identity()  # from here on the model gives what its classifier reads
    with bar:
        for files, pixels, errors in _batches(loader):
            bar.update(len(files) + len(errors))
            yield from errors
            if pixels is None:
                continue
            with torch.inference_mode(), _autocast(device, amp):
                vectors = model(reader.normalize(pixels.to(device, non_blocking=True)))
                probabilities = head(vectors).float().softmax(dim=1).cpu()
                vectors = vectors.float().cpu()
            if not (vectors if model.num_classes < 1 else probabilities).isfinite().all():
                raise UserError('The probabilities are not finite numbers: the weights are damaged.')
            values, indices = probabilities.topk(min(topk, len(labels)))
            rows = zip(files, values.tolist(), indices.tolist(), vectors.numpy(), strict=True)
            for file, row, best, vector in rows:
                result: dict[str, Any] = dict(image=file, classes=[
                    dict(index=i, label=labels[i], probability=round(p, 6)) for p, i in zip(row, best, strict=True)])
                if embeddings:
                    result['embedding'] = [float(str(v)) for v in vector]  # the fewest digits that tell float32 apart
                yield result
