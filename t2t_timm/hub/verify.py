"""What a directory, checkpoint file or tag holds, whether it loads, and how far its logits are from another's."""
import json
from pathlib import Path
from typing import NamedTuple, cast

import timm
import torch
from timm.models._hub import HF_SAFE_WEIGHTS_NAME

from ..errors import UserError, printable, suggestion
from ..models import T2TViT
from ..weights.checkpoint import read_checkpoint
from ..weights.download import file_hash, pretrained_file
from ..weights.manifest import ModelName, load_manifest
from ..weights.record import Record, shown
from .build import build, strict_state_dict

__all__ = ['TOLERANCE', 'Verdict', 'config_fault', 'verify']

TOLERANCE = 1e-4  # largest difference of two logits, in float32


class Verdict(NamedTuple):
    """What was found, and whether it is good."""
    lines: list[str]
    good: bool


def verify(
        first: str,
        second: str | None = None,
        model: str | None = None,
        img_size: tuple[int, int] | None = None,
        key: str | None = None,
) -> Verdict:
    """Say what weights are: format, architecture, size, hash, whether they load strictly; compare with a second's.

    Each model is built from its own record. Two are good if both load, their logits for two fixed images differ by no
    more than TOLERANCE, and what both say of preprocessing is the same.

    Args:
        first: Directory as `t2t-timm convert` writes it, checkpoint file, or architecture.tag, which is downloaded.
        second: Another, to compare with.
        model: Architecture[.tag] of the files, where their shapes leave a choice; by default what they look like.
        img_size: Size (H, W), in pixels, of the images of the files, if they do not say it.
        key: Model to take of a file that holds several, as 'teacher' or 'state_dict.backbone'.

    Raises:
        UserError: Nothing of that name, images of different size, or an img_size or key without a file.
    """
    if (img_size or key) and not any(Path(what).is_file() for what in (first, second or '')):
        raise UserError('--img-size and --key are for checkpoint files: a folder or a tag says what it is.')
    verdicts = [_inspect(what, model, img_size, key) for what in (first, second) if what is not None]
    lines = [line for found, _, _ in verdicts for line in found]
    models = [net for _, net, _ in verdicts if net is not None]
    good = len(models) == len(verdicts)
    if good and second is not None:
        difference = _compare(*models)
        good = difference <= TOLERANCE
        lines.append(
            f'largest difference of the logits: {difference:.3g} ({"no more" if good else "more"} than {TOLERANCE:g})')
        said, other = (record.data for _, _, record in verdicts)
        differing = [k for k in said if k in other and shown(said[k]) != shown(other[k])]
        lines += [f'preprocessing differs: {k} {shown(said[k])} and {shown(other[k])}' for k in differing]
        good = good and not differing
    return Verdict(lines, good)


def _inspect(
        what: str, model: str | None, img_size: tuple[int, int] | None, key: str | None,
) -> tuple[list[str], T2TViT | None, Record]:
    file, is_folder = _file_of(what), Path(what).is_dir()
    if not Path(what).is_file():
        model, img_size, key = None if is_folder else what, None, None
    lines = [what, f'  file: {file}', f'  size: {file.stat().st_size} bytes', f'  sha256: {file_hash(file)}']
    notes: list[str] = []
    record, net, loads = Record(), None, 'yes'
    try:
        checkpoint = read_checkpoint(file, key)
        lines.append(f'  format: {checkpoint.format}')
        notes, record = checkpoint.notes, checkpoint.record
        if is_folder:
            model = ModelName.parse(record.model).architecture or None
        built = build(checkpoint, what, model, img_size)
        if is_folder:
            built = _configured(what)  # what timm makes of the folder is what its users get
        height, width = built.patch_embed.img_size
        lines.append(
            f'  architecture: {built.pretrained_cfg["architecture"]}; {built.num_classes} classes, images of '
            f'{built.in_chans} x {height} x {width}')
        state_dict = strict_state_dict(checkpoint, built, what)
        built.load_state_dict({k: v.float() for k, v in state_dict.items()}, strict=True, assign=True)
        net = built.eval()
    except UserError as e:
        loads = f'no. {e}'
    return [*lines, *(f'  note: {printable(note)}' for note in notes), f'  loads strictly: {loads}'], net, record


def _file_of(what: str) -> Path:
    path = Path(what)
    if path.is_dir():
        path = path / HF_SAFE_WEIGHTS_NAME
        if not path.is_file():
            raise UserError(f'{what} holds no {HF_SAFE_WEIGHTS_NAME}: it was not written by `t2t-timm convert`.')
    if path.is_file():
        return path
    if what in load_manifest()['weights']:
        return pretrained_file(what)
    raise UserError(
        f'{what} is neither a folder, nor a file, nor a tag; `t2t-timm models` lists the tags.'
        f'{suggestion(what, load_manifest()["weights"])}')


def _configured(folder: str) -> T2TViT:
    try:
        return cast(T2TViT, timm.create_model(f'local-dir:{folder}', device='meta'))
    except Exception as e:  # a model's constructor raises nearly anything for arguments of the wrong kind
        raise UserError(
            f'{folder} has no config.json from which timm can make a model: '
            f'{config_fault(folder) or str(e) or type(e).__name__}') from e


def config_fault(folder: str) -> str | None:
    """Return what is wrong with a folder's config.json in words, where timm's own error is unclear; else None."""
    try:
        args = json.loads((Path(folder) / 'config.json').read_text(encoding='utf-8')).get('model_args', {})
    except (OSError, ValueError, AttributeError):
        return None
    return None if args is not None else (
        'its config.json has "model_args": null, as Transformers saves it, which timm cannot read: put {} for null')


def _compare(first: T2TViT, second: T2TViT) -> float:
    sizes = [(net.in_chans, *net.patch_embed.img_size) for net in (first, second)]
    if sizes[0] != sizes[1] or first.num_classes != second.num_classes:
        raise UserError(
            f'The two cannot be compared: one reads images of {sizes[0]} into {first.num_classes} classes, the other '
            f'of {sizes[1]} into {second.num_classes}.'
        )
    images = torch.randn(2, *sizes[0], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return (first(images) - second(images)).abs().max().item()
