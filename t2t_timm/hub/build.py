"""The model that a checkpoint's record describes, and whether the weights fit it."""
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.data.loader import adapt_to_chs
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg, is_model

from ..errors import UserError
from ..layers import join_positions, sinusoidal_pos_embed, tokens_grid_size
from ..models import T2TViT
from ..weights.checkpoint import Checkpoint
from ..weights.fit import input_channels, looks_like
from ..weights.manifest import ModelName, known_name
from ..weights.names import abbreviate
from ..weights.record import PREPROCESSING, shown

__all__ = ['build', 'strict_state_dict']

_OF_ONE_TAG = (
    'tag', 'license', 'origin_url', 'label_names', 'description', 'notes', 'source', 'url', 'file', 'hf_hub_id')


def build(
        checkpoint: Checkpoint,
        file: str | Path,
        model: str | None = None,
        img_size: tuple[int, int] | None = None,
) -> T2TViT:
    """Build, on the meta device, the model that a checkpoint is of.

    A tag decides everything. Without one, classes and input channels come from the shapes, and all that no shape shows
    from the record; the architecture's defaults are the last resort. `model` is architecture[.tag], by default what the
    record says, or else what the shapes fit; `img_size` (H, W), in pixels, goes before what the record says.

    Raises:
        UserError: The record contradicts itself, the model asked for, or what a model of this package can be.
    """
    record, said = checkpoint.record, ModelName.parse(checkpoint.record.model).architecture
    found = looks_like(checkpoint.state_dict, said)
    asked = model or (said if is_model(said) else found or said)
    if not asked:
        raise UserError(f'{file} has shapes that fit no architecture: name the expected one with --model.')
    name = known_name(asked)
    if is_model(said) and said != name.architecture:
        other = '' if found in (None, said) else (
            f', or --model {found} with a file of the state dict alone, if {said} is wrong')
        raise UserError(f'{file} says that it is {said}, not {name.architecture}: use --model {said}{other}.')
    if name.tag:
        own = {k: v for k, v in record.model_args.items() if k != 'img_size'}
        if img_size or own:
            what = '--img-size is for weights of your own, which have no tag' if img_size else (
                f'{file} was trained with {_listed(own)}, so it is not the published {name}')
            raise UserError(f'{what}: use --model {name.architecture}.')
        return cast(T2TViT, timm.create_model(str(name), device='meta'))
    usual: Any = get_pretrained_cfg(name.architecture)  # every architecture has one, that of its first tag
    cfg = _data_cfg(checkpoint, file, usual.to_dict(), img_size)
    args = dict(record.model_args)
    try:
        args['img_size'] = img_size or _model_size(checkpoint, cfg, usual.input_size[1:])
        _check_sizes(args['img_size'])
        depth = args.get('depth', args.get('block_config', 0))
        if (sum(depth) if isinstance(depth, (list, tuple)) else depth) > len(checkpoint.state_dict):
            raise ValueError(f'the file has {len(checkpoint.state_dict)} tensors, fewer than such a model has blocks')
        net = timm.create_model(name.architecture, pretrained_cfg=cfg, device='meta', **args)
        if not isinstance(net, T2TViT):
            raise ValueError(f'it makes a {type(net).__name__}')
    except Exception as e:  # a model's constructor raises nearly anything for arguments of the wrong kind
        raise UserError(
            f'{file} says that it is {name} with {_listed(args)}, which cannot be built: {str(e).rstrip(".")}.') from e
    return net


def _listed(args: dict[str, Any]) -> str:
    return ', '.join(f'{k}={shown(v)}' for k, v in args.items())


def _check_sizes(size: Iterable[Any], crop_pct: float = 1.) -> None:
    # an image is resized to its size divided by crop_pct before it is cropped
    if not 0.1 <= crop_pct <= 4 or not all(type(s) is int and 8 <= s <= 4096 and s / crop_pct <= 8192 for s in size):
        raise ValueError(
            'crop_pct should lie between 0.1 and 4.0, and a side between 8 and 4096 pixels, at most 8192 when divided '
            'by crop_pct')


def _data_cfg(
        checkpoint: Checkpoint, file: str | Path, usual: dict[str, Any], img_size: tuple[int, int] | None,
) -> dict[str, Any]:
    """Return the pretrained cfg with the record's preprocessing, which has been tried on an image."""
    head, data = checkpoint.state_dict.get('head.weight'), checkpoint.record.data
    channels = input_channels(checkpoint.state_dict) or usual['input_size'][0]
    cfg = {k: v for k, v in usual.items() if k not in _OF_ONE_TAG}
    cfg['num_classes'] = 0 if head is None or head.ndim != 2 else head.shape[0]
    if data.get('num_classes', cfg['num_classes']) != cfg['num_classes']:
        raise UserError(
            f'{file} has {cfg["num_classes"]} classes, and the {checkpoint.record.sources["num_classes"]} beside it '
            f'says {shown(data["num_classes"])}: if it is of another file, convert a copy in a folder of its own.')
    given: dict[str, Any] = {k: data.get(k, cfg.get(k)) for k in PREPROCESSING}
    try:
        given['input_size'] = (channels, *(img_size or given['input_size'][1:]))
        for key in ('mean', 'std'):  # timm's loader did the same in training
            given[key] = adapt_to_chs(given[key], channels) if key not in data or len(data[key]) == 3 else given[key]
        config = resolve_data_config(dict(given, in_chans=channels))
        _check_sizes(config['input_size'][1:], config['crop_pct'])
        if config['crop_mode'] not in ('center', 'squash', 'border'):  # timm takes others for center
            raise ValueError('crop_mode should be center, squash or border')
        mode = {1: 'L', 3: 'RGB', 4: 'RGBA'}.get(channels)
        pixels = create_transform(**config)(Image.new(mode, (48, 48))) if mode else torch.zeros(config['input_size'])
        if pixels.shape != config['input_size'] or not pixels.isfinite().all():
            raise ValueError('it makes no image of finite numbers of that size')
    except Exception as e:  # timm and torchvision raise nearly anything
        raise UserError(
            f'{file} says that its images were preprocessed with {_listed(data)}, which cannot be done: '
            f'{str(e).rstrip(".") or type(e).__name__}.') from e
    return cfg | config


def _model_size(checkpoint: Checkpoint, cfg: dict[str, Any], usual: tuple[int, int]) -> tuple[int, int]:
    """Return the image size (H, W) behind a position table: the first that is said and fits, or else a square."""
    record, table = checkpoint.record, checkpoint.state_dict.get('pos_embed')
    given = {'img_size': record.model_args.get('img_size'), 'input_size': cfg['input_size'][1:]}
    sizes = [to_2tuple(given[key]) for key in record.sources if given.get(key)] or [given['input_size']]
    if record.model_args.get('dynamic_img_size') and not given['img_size']:
        sizes.insert(0, usual)  # images may have another size than the table is for
    if table is None or table.ndim != 3:
        return sizes[0]
    num_tokens = table.shape[1] - int('cls_token' in checkpoint.state_dict)
    for size in sizes:
        if math.prod(tokens_grid_size(size)) == num_tokens:
            return size
    side = 16 * math.isqrt(max(num_tokens, 0))
    if given.keys() & record.sources.keys() or not math.prod(tokens_grid_size((side, side))) == num_tokens > 0:
        return sizes[0]
    checkpoint.notes.append(
        f'nothing says the image size, {num_tokens} tokens taken for {side} x {side} pixels: give --img-size H W if it '
        'was another')
    cfg['input_size'] = (cfg['input_size'][0], side, side)
    return side, side


def strict_state_dict(checkpoint: Checkpoint, model: T2TViT, file: str | Path) -> dict[str, torch.Tensor]:
    """Return the state dict of a checkpoint, completed with the position table, if it fits a model exactly.

    If not, a UserError says which names and shapes differ, or which architecture would fit.
    """
    state_dict = dict(checkpoint.state_dict)
    name = ModelName(model.pretrained_cfg['architecture'], model.pretrained_cfg.get('tag') or '')
    if model.has_sinusoidal_pos_embed and 'pos_embed' not in state_dict:
        full = sinusoidal_pos_embed(1 + model.patch_embed.num_patches, model.embed_dim)
        state_dict['pos_embed'] = join_positions(
            full, model.has_class_token, model.num_reg_tokens, model.no_embed_class)
        checkpoint.notes.append("no pos_embed in it, the model's own sinusoidal table taken")
    expected, actual = ({k: tuple(v.shape) for k, v in d.items()} for d in (model.state_dict(), state_dict))
    if actual == expected:
        return state_dict
    found = looks_like(checkpoint.state_dict, name.architecture)
    if found not in (None, name.architecture):
        raise UserError(f'{file} looks like {found}, not like {name.architecture}: use --model {found}.')
    missing = [k for k in expected if k not in actual]
    unexpected = [k for k in actual if k not in expected]
    reshaped = [k for k in expected if k in actual and actual[k] != expected[k]]
    differences = '; '.join(f'{what} {abbreviate(names)}' for what, names in (
        ('missing', missing),
        ('unexpected', unexpected),
        ('of another shape', [f'{k} {actual[k]} instead of {expected[k]}' for k in reshaped]),
    ) if names)
    advice = ''
    if name.tag:
        advice = f': if it is not that tag, use --model {name.architecture}'
    elif 'cls_token' in missing:
        advice = (
            ': a model without a class token needs a config.json or training arguments that name class_token and '
            'global_pool')
    elif reshaped == ['pos_embed'] and not missing and not unexpected:
        height, width = model.patch_embed.img_size
        advice = f', for images of {height} x {width} pixels: give the size that it was trained with as --img-size H W'
    args = '' if name.tag else _listed(checkpoint.record.model_args)
    raise UserError(f'{file} does not fit {f"{name} with {args}" if args else name}: {differences}{advice}.')
