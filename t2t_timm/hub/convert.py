"""Conversion of a published checkpoint of any format into a directory that timm, Transformers and the Hub read."""
import json
import logging
import math
import os
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import timm
import torch
from huggingface_hub.utils import tqdm
from timm.data import ImageDataset, infer_imagenet_subset
from timm.data.loader import adapt_to_chs
from timm.models import PretrainedCfg, get_pretrained_cfg, list_models
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, save_config_for_hf

from ..errors import UserError, nearest, require_timm
from ..files import new_folder
from ..layers import sinusoidal_pos_embed, tokens_grid_size
from ..models import T2TViT
from ..weights.checkpoint import Checkpoint, read_checkpoint
from ..weights.download import check_file, file_hash
from ..weights.fit import input_channels, looks_like
from ..weights.manifest import load_manifest
from ..weights.names import some
from .cards import architecture_card, tag_card

_logger = logging.getLogger(__name__)

__all__ = ['build_for', 'check_fit', 'convert', 'describe', 'resolve_name']

_PREPROCESSING = ('mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
_OF_ONE_TAG = (
    'tag', 'license', 'origin_url', 'label_names', 'description', 'notes', 'source', 'url', 'file', 'hf_hub_id')


def convert(
        file: str | Path,
        model: str,
        out: str | Path,
        labels: str | Path | None = None,
        checked: bool = False,
        img_size: tuple[int, int] | None = None,
        key: str | None = None,
) -> Path:
    """Convert a checkpoint of any published format into a directory that timm loads as local-dir:DIR.

    The directory holds model.safetensors (float32), config.json and README.md, the model card. It appears whole or not
    at all: all is written beside it first.

    Args:
        file: Checkpoint; its format is recognised.
        model: Architecture, or architecture.tag if the file holds the weights of that tag.
        out: Directory to make; may exist if it is empty.
        labels: Names of the classes of weights of one's own: the folder of class folders that they were trained on, or
            a text file with one name per line.
        checked: The file has been compared with the manifest already.
        img_size: Size (H, W), in pixels, of the images that weights of one's own were trained with, if the file does
            not say it.
        key: Model to take if the file holds several, as 'teacher' or 'state_dict.backbone'.

    Returns:
        The directory.

    Raises:
        UserError: The file is not a readable checkpoint of that architecture, the names are not as many as its classes,
            or the directory is taken.
    """
    file, out = Path(file), Path(out)
    architecture, tag = resolve_name(model)
    _check_out(out)
    if file.is_dir():
        raise UserError(f'{file} is a folder: name a checkpoint file.')
    if not file.is_file():
        raise UserError(f'There is no file {file}.')
    if labels is not None and tag:
        raise UserError(
            f'--labels names the classes of weights of your own, which have no tag: use --model {architecture}.')
    names = None if labels is None else _label_names(Path(labels))
    entry = load_manifest()['weights'].get(model)
    if not checked and entry is not None and file.name == entry['file']:
        check_file(file, entry, model)
    size = file.stat().st_size
    with tqdm(
            total=3 * size, unit='B', unit_scale=True, desc=f'Converting {file.name}', delay=1, disable=None) as bar:
        checkpoint = read_checkpoint(file, key)
        bar.update(size)
        net = build_for(architecture, tag, checkpoint, img_size)
        state_dict = check_fit(checkpoint, net, file)
        if names is not None and len(names) != net.num_classes:
            raise UserError(f'{labels} should name the {net.num_classes} classes of {file}, but it names {len(names)}.')
        if not tag:
            _name_classes(net, names or _names_beside(file, net.num_classes))
        bar.update(size)
        _logger.info('; '.join([f'{file.name}: {checkpoint.format}'] + checkpoint.notes))
        with new_folder(out) as folder:
            tensors = {k: v.detach().to(torch.float32, copy=True).contiguous() for k, v in state_dict.items()}
            # save_file() would make a file that nobody else may read, and raises errors of its own for a full disk.
            (folder / HF_SAFE_WEIGHTS_NAME).write_bytes(safetensors.torch.save(tensors, metadata={'format': 'pt'}))
            describe(folder, net, {} if tag else checkpoint.train_args)
        bar.update(size)
    weights = out / HF_SAFE_WEIGHTS_NAME
    _logger.info(f'{weights.name}: {weights.stat().st_size} bytes, sha256 {file_hash(weights)}')
    return out


def _label_names(labels: Path) -> list[str]:
    if labels.is_dir():
        try:
            names = list(ImageDataset(str(labels)).reader.class_to_idx)  # numbered as train.py numbers them
        except RuntimeError:
            names = []
        if not names or '' in names:  # images that lie in no folder of their own have the class ''
            raise UserError(f'{labels} should hold a folder of images for each class.')
        return names
    if not labels.is_file():
        raise UserError(f'There is no folder or file {labels} with the names of the classes.')
    try:
        names = [line.strip() for line in labels.read_text(encoding='utf-8-sig').splitlines()]
    except UnicodeDecodeError as e:
        raise UserError(f'{labels} is not a text file in UTF-8: it should have one class name per line.') from e
    if not all(name and name.isprintable() for name in names) or len(set(names)) < len(names):
        raise UserError(f'{labels} should have one class name per line, each once, in printable characters.')
    return names


def _name_classes(model: T2TViT, names: list[str] | None) -> None:
    if names:
        model.pretrained_cfg['label_names'] = names
    elif model.num_classes and infer_imagenet_subset(model) is None:
        _logger.info('The classes have no names: --labels FOLDER|FILE gives them.')


def _names_beside(file: Path, num_classes: int) -> list[str] | None:
    """Return the names of the classes in the config.json that timm or Transformers wrote beside weights, if any."""
    try:
        names = json.loads(file.with_name('config.json').read_text(encoding='utf-8'))['label_names']
    except (OSError, ValueError, KeyError, TypeError):
        return None
    known = isinstance(names, list) and len(names) == num_classes and all(isinstance(name, str) for name in names)
    return names if known else None


def resolve_name(model: str) -> tuple[str, str]:
    """Split architecture[.tag], the tag '' if there is none.

    Raises:
        UserError: No such architecture, or no such tag of it.
    """
    architecture, _, tag = model.partition('.')
    architectures = list_models('*t2t_vit*')
    if architecture not in architectures:
        raise UserError(
            f'There is no architecture {architecture!r}; there are {", ".join(architectures)}.'
            f'{nearest(architecture, architectures)}')
    names = [name for name in load_manifest()['weights'] if name.split('.')[0] == architecture]
    if tag and model not in names:
        tags = f'its tags are {", ".join(names)}' if names else 'it has no tags'
        raise UserError(
            f'{architecture} has no tag {tag!r}; {tags}. Weights of your own go without one: --model {architecture}.')
    return architecture, tag


def _check_out(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise UserError(f'{out} exists and is not empty: name a new folder, or empty it.')
    if os.path.lexists(out) and not out.is_dir():
        raise UserError(f'{out} exists and is not a folder: name a new one.')
    if not out.absolute().parent.is_dir():
        raise UserError(f'There is no folder {out.absolute().parent} to make {out.name} in.')


def _usual_cfg(architecture: str) -> PretrainedCfg:
    cfg = get_pretrained_cfg(architecture)
    assert cfg is not None  # every architecture of this package has one
    return cfg


def build_for(
        architecture: str,
        tag: str,
        checkpoint: Checkpoint,
        img_size: tuple[int, int] | None = None,
) -> T2TViT:
    """Build, on the meta device, the model that a checkpoint fits.

    A tag decides everything; without one, classes, input channels and image size come from the checkpoint.

    Raises:
        UserError: An img_size beside a tag.
    """
    if tag and img_size:
        raise UserError(
            f'--img-size is for weights of your own, which have no tag: use --model {architecture}.')
    if tag:
        return cast(T2TViT, timm.create_model(f'{architecture}.{tag}', device='meta'))
    state_dict = checkpoint.state_dict
    cfg = {k: v for k, v in _usual_cfg(architecture).to_dict().items() if k not in _OF_ONE_TAG}
    head = state_dict.get('head.weight')
    cfg['num_classes'] = 0 if head is None or head.ndim != 2 else head.shape[0]
    cfg['input_size'] = (
        input_channels(state_dict) or cfg['input_size'][0],
        *(img_size or _img_size(checkpoint, cfg['input_size'][1:])),
    )
    for key in ('mean', 'std'):
        cfg[key] = adapt_to_chs(cfg[key], cfg['input_size'][0])  # timm's loader did the same in training
    # the size stands in the cfg too, but some architectures have one of their own
    return cast(T2TViT, timm.create_model(
        architecture, pretrained_cfg=cfg, img_size=cfg['input_size'][1:], device='meta'))


def _img_size(checkpoint: Checkpoint, usual: tuple[int, int]) -> tuple[int, int]:
    # the image size behind a position table: the architecture's, the training run's, or a square
    pos_embed = checkpoint.state_dict.get('pos_embed')
    if pos_embed is None or pos_embed.ndim != 3:
        return usual
    num_tokens = pos_embed.shape[1] - 1
    candidates = [usual]
    args = checkpoint.train_args
    if 'input_size' in args:
        candidates.append(tuple(args['input_size'][1:]))
    if 'img_size' in args:
        candidates.append((args['img_size'], args['img_size']))
    known = next((size for size in candidates if math.prod(tokens_grid_size(size)) == num_tokens > 0), None)
    side = 16 * math.isqrt(max(num_tokens, 0))
    if known is None and math.prod(tokens_grid_size((side, side))) == num_tokens > 0:
        checkpoint.notes.append(
            f'nothing says the image size, {num_tokens} tokens taken for {side} x {side} pixels: give --img-size H W '
            'if it was another'
        )
        return side, side
    return known or usual


def check_fit(checkpoint: Checkpoint, model: T2TViT, file: str | Path) -> dict[str, torch.Tensor]:
    """Return the state dict of a checkpoint, completed with the position table, if it fits a model exactly.

    Raises:
        UserError: A name is missing or unexpected, or a shape differs; it names the architecture that would fit. Or a
            value is not finite.
    """
    state_dict, architecture = dict(checkpoint.state_dict), model.pretrained_cfg['architecture']
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    if 'pos_embed' not in state_dict:
        state_dict['pos_embed'] = sinusoidal_pos_embed(*expected['pos_embed'][1:])
        checkpoint.notes.append("no pos_embed in it, the model's own sinusoidal table taken")
    actual = {k: tuple(v.shape) for k, v in state_dict.items()}
    if actual == expected:
        damaged = [k for k, v in state_dict.items() if not v.isfinite().all()]
        if damaged:
            raise UserError(f'{file} is damaged: it has values that are not finite in {some(damaged)}.')
        return state_dict
    found = looks_like(checkpoint.state_dict)
    if found is not None and found != architecture:
        raise UserError(f'{file} looks like {found}, not like {architecture}: use --model {found}.')
    differing = {k for k in {**actual, **expected} if actual.get(k) != expected.get(k)}
    if model.pretrained_cfg.get('tag') and differing <= {'head.weight', 'head.bias'}:
        classes, usual = ((shapes.get('head.bias') or ('no',))[0] for shapes in (actual, expected))
        raise UserError(
            f'{file} has {classes} classes, {_full_name(model)} has {usual}: if it is not that tag, use --model '
            f'{architecture}.'
        )
    table, (_, num_positions, width) = actual['pos_embed'], expected['pos_embed']
    if not model.pretrained_cfg.get('tag') and differing == {'pos_embed'} and table[::2] == (1, width):
        size = ' x '.join(map(str, model.patch_embed.img_size))
        raise UserError(
            f'{file} does not fit {_full_name(model)}: it has {table[1]} positions, and images of {size} pixels need '
            f'{num_positions}. Give the size of the images that it was trained with, as --img-size H W.'
        )
    raise UserError(f'{file} does not fit {_full_name(model)}: {"; ".join(_differences(actual, expected))}.')


def _full_name(model: T2TViT) -> str:
    cfg = model.pretrained_cfg
    return '.'.join(filter(None, (cfg['architecture'], cfg.get('tag'))))


def _differences(actual: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    missing = [k for k in expected if k not in actual]
    unexpected = [k for k in actual if k not in expected]
    wrong = [f'{k} {actual[k]} instead of {expected[k]}' for k in expected if actual.get(k, expected[k]) != expected[k]]
    return [f'{what} {some(names)}' for what, names in (
        ('missing', missing), ('unexpected', unexpected), ('of another shape', wrong)) if names]


def describe(folder: Path, model: T2TViT, train_args: dict[str, Any]) -> None:
    """Write a model's config.json and README.md, the model card, into a folder.

    Args:
        folder: Folder that exists.
        model: Model, which may be on the meta device.
        train_args: Preprocessing that it was trained with, where that is not its pretrained cfg's.
    """
    cfg = model.pretrained_cfg
    architecture = cfg['architecture']
    _write_config(folder / 'config.json', model, architecture, train_args)
    card = tag_card(_full_name(model)) if cfg.get('tag') else architecture_card(
        architecture, model.num_classes, cfg['input_size'], cfg.get('label_names', ()))
    (folder / 'README.md').write_text(card, encoding='utf-8', newline='\n')


def _write_config(path: Path, model: T2TViT, architecture: str, train_args: dict[str, Any]) -> None:
    # timm writes every argument that it knows. Transformers passes num_classes itself, and trips over a second one; it
    # does not read pretrained_cfg, and needs what differs from the architecture's defaults.
    require_timm('1.0.31', 'Writing a config.json')
    label_names = model.pretrained_cfg.get('label_names')
    data_config = {k: train_args[k] for k in _PREPROCESSING if k in train_args}
    save_config_for_hf(
        model, str(path),
        model_config={'label_names': list(label_names)} if label_names else None,
        data_config=data_config,
    )
    config = json.loads(path.read_text(encoding='utf-8'))
    size = _usual_cfg(architecture).input_size
    usual = dict(in_chans=size[0], img_size=list(size[1:]), global_pool='token')
    # An empty entry is written too: Transformers saves null for what is missing, which timm cannot read.
    config['model_args'] = {
        k: v for k, v in config['model_args'].items() if k != 'num_classes' and usual.get(k) != v}
    path.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8', newline='\n')
