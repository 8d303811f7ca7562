"""The model that a checkpoint's record describes, and whether the weights fit it."""
import math
from pathlib import Path
from typing import Any, cast

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.models import PretrainedCfg, get_pretrained_cfg

from ..errors import UserError
from ..layers import sinusoidal_pos_embed, tokens_grid_size
from ..models import T2TViT
from ..weights.checkpoint import Checkpoint
from ..weights.fit import input_channels, looks_like
from ..weights.manifest import ModelName, known_name
from ..weights.names import some
from ..weights.record import PREPROCESSING

__all__ = ['build', 'check_fit', 'full_name', 'usual_cfg']

_OF_ONE_TAG = (
    'tag', 'license', 'origin_url', 'label_names', 'description', 'notes', 'source', 'url', 'file', 'hf_hub_id')
_SCALES = (0.1, 4.)  # range of crop_pct: an image is resized to the model's size divided by it


def usual_cfg(architecture: str) -> PretrainedCfg:
    """Return the pretrained cfg of an architecture's first tag."""
    cfg = get_pretrained_cfg(architecture)
    assert cfg is not None  # every architecture of this package has one
    return cfg


def full_name(model: T2TViT) -> str:
    """Return a model's architecture[.tag]."""
    return str(ModelName(model.pretrained_cfg['architecture'], model.pretrained_cfg.get('tag') or ''))


def build(
        checkpoint: Checkpoint,
        file: str | Path,
        model: str | None = None,
        img_size: tuple[int, int] | None = None,
) -> T2TViT:
    """Build, on the meta device, the model that a checkpoint is of.

    A tag decides everything. Without one, classes and input channels come from the shapes, and all that no shape shows
    from the record; the architecture's defaults are the last resort.

    Args:
        checkpoint: What the file held.
        file: The file, for messages.
        model: Architecture[.tag], by default what the record says, or else what the shapes fit.
        img_size: Size (H, W) of the images that it was trained with, in pixels, if the record does not say it.

    Raises:
        UserError: The record contradicts itself, the model asked for, or what a model of this package can be.
    """
    record = checkpoint.record
    said, found = ModelName.parse(record.model).architecture, looks_like(checkpoint.state_dict)
    model = model or said or found
    if model is None:
        raise UserError(f'{file} has shapes that fit no architecture: name the expected one with --model.')
    name = known_name(model)
    if said and said != name.architecture:
        what = f'{file} says that it is {said}' if said == found or found is None else (
            f'{file} looks like {found} and says that it is {said}')
        raise UserError(f'{what}, not {name.architecture}: use --model {found or said}.')
    if name.tag:
        if img_size:
            raise UserError(
                f'--img-size is for weights of your own, which have no tag: use --model {name.architecture}.')
        net = cast(T2TViT, timm.create_model(str(name), device='meta'))
        own = {k: v for k, v in record.model_args.items() if k != 'img_size'}
        if own:
            raise UserError(
                f'{file} was trained with {_shown(own)}, so it is not the published {name}: use --model '
                f'{name.architecture}.')
        return net
    usual = usual_cfg(name.architecture)
    cfg = _data_cfg(checkpoint, file, usual.to_dict(), img_size)
    args = dict(record.model_args, img_size=img_size or _model_size(checkpoint, cfg, usual.input_size[1:]))
    try:
        return cast(T2TViT, timm.create_model(name.architecture, pretrained_cfg=cfg, device='meta', **args))
    except Exception as e:  # a model's constructor raises nearly anything for arguments of the wrong kind
        raise UserError(f'{file} says that it is {name} with {_shown(args)}, which cannot be built: {e}') from e


def _shown(args: dict[str, Any]) -> str:
    return ', '.join(f'{k}={v!r}' for k, v in args.items())


def _data_cfg(
        checkpoint: Checkpoint,
        file: str | Path,
        usual: dict[str, Any],
        img_size: tuple[int, int] | None,
) -> dict[str, Any]:
    """Return the pretrained cfg with the record's preprocessing, which has been tried on an image."""
    head = checkpoint.state_dict.get('head.weight')
    channels = input_channels(checkpoint.state_dict) or usual['input_size'][0]
    cfg = {k: v for k, v in usual.items() if k not in _OF_ONE_TAG}
    cfg['num_classes'] = 0 if head is None or head.ndim != 2 else head.shape[0]
    data = checkpoint.record.data
    given = {k: data.get(k, cfg.get(k)) for k in PREPROCESSING}
    if img_size:
        given['input_size'] = (channels, *img_size)
    try:
        given['input_size'] = (channels, *given['input_size'][1:])
        for key in ('mean', 'std'):  # timm's loader did the same in training
            given[key] = adapt_to_chs(given[key], channels) if key not in data or len(data[key]) == 3 else given[key]
        config = resolve_data_config(dict(given, in_chans=channels))
        low, high = _SCALES
        if not low <= config['crop_pct'] <= high or not all(8 <= s <= 4096 for s in config['input_size'][1:]):
            raise ValueError(f'crop_pct should lie between {low} and {high}, and a side between 8 and 4096 pixels')
        mode = {1: 'L', 3: 'RGB', 4: 'RGBA'}.get(channels)
        pixels = create_transform(**config)(Image.new(mode, (64, 48))) if mode else torch.zeros(config['input_size'])
        if pixels.shape != config['input_size'] or not pixels.isfinite().all():
            raise ValueError('it makes no image of finite numbers of that size')
    except Exception as e:  # timm and torchvision raise nearly anything
        raise UserError(
            f'{file} says that its images were preprocessed with {_shown(data)}, which cannot be done: '
            f'{str(e) or type(e).__name__}.') from e
    return cfg | config


def _model_size(checkpoint: Checkpoint, cfg: dict[str, Any], usual: tuple[int, int]) -> tuple[int, int]:
    """Return the image size (H, W) behind a position table: what is said of it, or else a square."""
    record, table = checkpoint.record, checkpoint.state_dict.get('pos_embed')
    if 'img_size' in record.model_args:
        return record.model_args['img_size']
    sizes = [cfg['input_size'][1:]]
    if record.model_args.get('dynamic_img_size'):  # then images may have another size than the table is for
        sizes.insert(0, usual)
    if table is None or table.ndim != 3:
        return sizes[0]
    num_tokens = table.shape[1] - int('cls_token' in checkpoint.state_dict)
    for size in sizes:
        if math.prod(tokens_grid_size(size)) == num_tokens:
            return size
    side = 16 * math.isqrt(max(num_tokens, 0))
    if 'input_size' not in record.data and math.prod(tokens_grid_size((side, side))) == num_tokens > 0:
        checkpoint.notes.append(
            f'nothing says the image size, {num_tokens} tokens taken for {side} x {side} pixels: give --img-size H W '
            'if it was another'
        )
        cfg['input_size'] = (cfg['input_size'][0], side, side)
        return side, side
    return sizes[0]


def check_fit(checkpoint: Checkpoint, model: T2TViT, file: str | Path) -> dict[str, torch.Tensor]:
    """Return the state dict of a checkpoint, completed with the position table, if it fits a model exactly.

    Raises:
        UserError: A name is missing or unexpected, or a shape differs; it names the architecture that would fit.
    """
    state_dict, name = dict(checkpoint.state_dict), full_name(model)
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    if 'pos_embed' not in state_dict:
        state_dict['pos_embed'] = sinusoidal_pos_embed(*expected['pos_embed'][1:])
        checkpoint.notes.append("no pos_embed in it, the model's own sinusoidal table taken")
    actual = {k: tuple(v.shape) for k, v in state_dict.items()}
    if actual == expected:
        return state_dict
    architecture, tag = ModelName.parse(name)
    found = looks_like(checkpoint.state_dict)
    if found is not None and found != architecture:
        raise UserError(f'{file} looks like {found}, not like {architecture}: use --model {found}.')
    differing = {k for k in {**actual, **expected} if actual.get(k) != expected.get(k)}
    if tag and differing <= {'head.weight', 'head.bias'}:
        classes, usual = ((shapes.get('head.bias') or ('no',))[0] for shapes in (actual, expected))
        raise UserError(
            f'{file} has {classes} classes, {name} has {usual}: if it is not that tag, use --model {architecture}.')
    if 'cls_token' in expected and 'cls_token' not in actual:
        raise UserError(
            f'{file} has no class token (cls_token), and nothing in it says how the model pools its tokens: models '
            'without one need a config.json or training arguments that name class_token and global_pool.')
    table, own = actual['pos_embed'], expected.get('pos_embed', ())
    if not tag and differing == {'pos_embed'} and table[::2] == own[::2]:
        height, width = model.patch_embed.img_size
        source = checkpoint.record.sources.get('img_size') or checkpoint.record.sources.get('input_size')
        said = f' as {source} have it' if source else ''
        raise UserError(
            f'{file} does not fit {name}: it has {table[1]} positions, and images of {height} x {width} pixels{said} '
            f'need {own[1]}. Give the size of the images that it was trained with, as --img-size H W.'
        )
    args = checkpoint.record.model_args
    with_args = f' with {_shown(args)}' if args and not tag else ''
    raise UserError(f'{file} does not fit {name}{with_args}: {"; ".join(_differences(actual, expected))}.')


def _differences(actual: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    missing = [k for k in expected if k not in actual]
    unexpected = [k for k in actual if k not in expected]
    wrong = [f'{k} {actual[k]} instead of {expected[k]}' for k in expected if actual.get(k, expected[k]) != expected[k]]
    return [f'{what} {some(names)}' for what, names in (
        ('missing', missing), ('unexpected', unexpected), ('of another shape', wrong)) if names]
