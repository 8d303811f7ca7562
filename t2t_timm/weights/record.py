"""The record of a checkpoint: what the model was and what it was fed, as far as files say it, and which one said it."""
import argparse
import ast
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg, is_model

from ..errors import UserError
from .manifest import ModelName, tagged

__all__ = ['PREPROCESSING', 'Record', 'record_of', 'shown']

PREPROCESSING = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')

# What changes the function of a model and shows in no shape, or in few: read from arguments that stand among others.
_FUNCTION = (
    'global_pool', 'num_heads', 'act_layer', 'norm_layer', 'dynamic_img_size', 'dynamic_img_pad', 'pos_embed',
    'class_token', 'no_embed_class', 'reg_tokens', 'pool_include_prefix', 'token_type', 'qkv_bias', 'qk_norm',
    'init_values', 'fc_norm', 'pre_norm', 'final_norm', 'embed_dim', 'depth', 'mlp_ratio',
)
# Arguments of timm.create_model that train, place or load a model and do not change it.
_TRAINING = re.compile(
    r'pretrained.*|checkpoint_path|cache_dir|device|dtype|scriptable|weight_init|fix_init|num_classes|in_chans|drop_.*|'
    r'.*_drop_rate')
_LARGEST = 1 << 20  # characters of a config
_LONGEST_PYTHON = 1 << 16  # characters; Python 3.10 parses long chains by recursion, without a limit
_LONGEST = 1 << 10  # entries of a list, but for the names of the classes


@dataclass
class Record:
    """What files say of a model; `sources` says of each entry which one said it, the first one first.

    Attributes:
        model: What the run began with, as timm.create_model takes it: architecture.tag, local-dir:DIR, hf-hub:REPO.
        model_args: Arguments of the model's entrypoint that differ from its defaults.
        data: Preprocessing, as timm's data config has it, and num_classes if a config.json says it.
        label_names: Names of the classes.
        timm_order: The classes are numbered as timm's train.py does it.
        class_map: File that numbered the classes instead of their folders, or ''.
        notes: What could not be taken.
    """
    model: str = ''
    model_args: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    label_names: list[str] | None = None
    timm_order: bool = False
    class_map: str = ''
    sources: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, source: str, model: str = '', label_names: Any = None, **entries: Any) -> None:
        """Take what a further source says and no earlier one did; a UserError names what a config.json cannot hold."""
        self.model = self.model or model
        if label_names is not None and self.label_names is None:
            if not isinstance(label_names, (list, tuple)) or not all(_text(n) and n.isprintable() for n in label_names):
                raise UserError(
                    f'{source} should name the classes in a list of texts, not {shown(label_names)}, each printable.')
            self.label_names = list(label_names)
            self.sources['label_names'] = source
        for kind, values in entries.items():
            mine = getattr(self, kind)
            for key, value in values.items():
                if key in mine or kind == 'model_args' and _TRAINING.fullmatch(key):
                    continue
                if not _is_plain(value):
                    raise UserError(
                        f'{source}: {key}={shown(value)}, which a config.json cannot hold: it should be a number, a '
                        'text, a truth value, or a list of these.')
                mine[key] = value
                self.sources[key] = source

    def told(self) -> list[str]:
        """Return, for each source, what was taken from it, and what could not be."""
        values = {**self.model_args, **self.data, 'label_names': f'{len(self.label_names or ())} names'}
        by_source: dict[str, list[str]] = {}
        for key, source in self.sources.items():
            text = re.sub(r"[][,'()]", '', shown(values[key]))
            by_source.setdefault(source, []).append(f'{key} {text}')
        return [f'from {source}: {", ".join(entries)}' for source, entries in by_source.items()] + self.notes


def shown(value: Any, depth: int = 2) -> str:
    """Return a value of a file as text of bounded length: a short file can hold a list of one list twice, and so on."""
    if isinstance(value, (list, tuple)) and depth:
        return f'[{", ".join(shown(v, depth - 1) for v in value[:16])}{", ..." if len(value) > 16 else ""}]'
    if isinstance(value, (dict, list, tuple, set, argparse.Namespace)):
        return f'<{type(value).__name__}>'
    if isinstance(value, int) and abs(value) >> 64:
        return f'a number of {value.bit_length()} bits'
    return repr(value[:200] if isinstance(value, str) else value)


def _is_plain(value: Any, depth: int = 2) -> bool:
    if isinstance(value, (list, tuple)):
        return depth > 0 and len(value) <= _LONGEST and all(_is_plain(v, depth - 1) for v in value)
    if isinstance(value, (int, float)):
        return math.isfinite(value) if isinstance(value, float) else not abs(value) >> 53
    return value is None or isinstance(value, str)


def _given(values: dict[Any, Any], names: Iterable[str]) -> dict[str, Any]:
    # train.py has None or '' for an option that was not typed
    return {k: values[k] for k in names if values.get(k) not in (None, '')}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ''


def _dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _read_config(folder: Path, record: Record, source: str = 'config.json', is_start: bool = False) -> bool:
    """Add what the config.json in a folder says, as timm and Transformers write it; return whether it is of a T2T-ViT.

    With is_start it is of the model that a run started from, whose classes were others.
    """
    path = folder / 'config.json'
    if not os.path.isfile(path):  # unlike Path.is_file(), False for what cannot be looked into
        return False
    try:
        with open(path, encoding='utf-8-sig') as f:
            config = json.loads(f.read(_LARGEST))
    except (ValueError, RecursionError) as e:
        raise UserError(f'{path} is not readable JSON: {e}.') from e
    architecture = _text(_dict(config).get('architecture'))
    if not architecture or is_model(architecture) and 't2t_vit' not in architecture:
        return False
    cfg, args = _dict(config.get('pretrained_cfg')), config.get('model_args') or {}
    if not isinstance(args, dict):
        raise UserError(f'{path} should have model_args as names with values, not {shown(args)}.')
    record.add(
        source,
        model=str(ModelName(architecture, _text(cfg.get('tag')))),
        label_names=None if is_start else config.get('label_names', cfg.get('label_names')),
        model_args=_given(config, ('global_pool',)) | args,
        data=_given(cfg, PREPROCESSING) | ({} if is_start else _given(config, ('num_classes',))),
    )
    return True


def record_of(loaded: dict[Any, Any], folder: Path) -> Record:
    """Return the record of what a checkpoint file in a folder held.

    The first source that says something is believed: the config.json beside the file, the run's own arguments (timm's,
    Lightning's, mmengine's), the pretrained cfg of what the run started from. Nothing is asked of a network.
    """
    record = Record()
    _read_config(folder, record)
    for key, source in (('args', "the run's arguments"), ('hyper_parameters', "Lightning's hyper_parameters")):
        args = loaded.get(key)
        args = vars(args) if isinstance(args, argparse.Namespace) else args
        if isinstance(args, dict):
            _add_arguments(record, args, source)
            record.timm_order |= key == 'args' and 'model_kwargs' in args
    if isinstance(loaded.get('meta'), dict):
        _add_openmmlab(record, loaded['meta'])
    if ':' in record.model:
        start, record.model = record.model, ''
        source = f'{start}, which the run started from'
        if not start.startswith('local-dir:'):
            record.notes.append(f'the run started from {start}, which was not asked how it preprocesses images')
        elif not _read_config(Path(start.removeprefix('local-dir:')), record, source, is_start=True):
            record.notes.append(f'{source}, which is no longer there: its preprocessing is not known')
    if is_model(record.model):
        name = ModelName.parse(record.model)
        if str(name) not in tagged(name.architecture):
            name = ModelName(name.architecture)  # a tag of somebody's own
        if cfg := get_pretrained_cfg(str(name)):
            record.add(f"{name}'s pretrained cfg", data=_given(cfg.to_dict(), PREPROCESSING[1:]))
    return record


def _add_arguments(record: Record, args: dict[Any, Any], source: str) -> None:
    data = _given(args, PREPROCESSING)
    kwargs: Any = next((args[k] for k in ('model_kwargs', 'model_args') if args.get(k)), {})
    channels = args.get('in_chans') or kwargs.get('in_chans') or 3
    size = data.pop('input_size', None) or args.get('img_size')
    if isinstance(size, (list, tuple)):
        data['input_size'] = size if len(size) == 3 else (channels, *size)
        channels = data['input_size'][0]
    elif size:
        data['input_size'] = (channels, size, size)
    mode = args.get('input_img_mode')
    if mode and (mode, channels) not in (('RGB', 3), ('L', 1)):
        raise UserError(
            f'{source} have input_img_mode={shown(mode)}: images are read as RGB here, or as L by a model of one '
            'channel.')
    names = [_text(args.get(k)) for k in ('model', 'model_name', 'architecture', 'arch')]
    record.add(
        source,
        model=next((n for n in names if 't2t_vit' in n or ':' in n), ''),
        model_args=({'global_pool': args['gp']} if args.get('gp') else {}) | _given(args, _FUNCTION) | kwargs,
        data=data,
    )
    record.class_map = record.class_map or _text(args.get('class_map'))


def _literal(node: ast.AST) -> Any:
    # The value of Python's text, which is not run: plain values, and dict() of them; None for all else.
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == 'dict':
        return {k.arg: _literal(k.value) for k in node.keywords if k.arg}
    if isinstance(node, ast.Dict):
        return {_literal(k): _literal(v) for k, v in zip(node.keys, node.values, strict=True) if k is not None}
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_literal(v) for v in node.elts]
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None


def _add_openmmlab(record: Record, meta: dict[str, Any]) -> None:
    """Add what OpenMMLab's runner says: the text of its config file, and the names of the classes."""
    source = "OpenMMLab's meta"
    record.add(source, label_names=_dict(meta.get('dataset_meta')).get('classes', meta.get('CLASSES')))
    text = _text(meta.get('cfg') or meta.get('config'))
    try:
        if len(text) > _LONGEST_PYTHON:
            raise ValueError('too long')
        statements = ast.parse(text).body
        config = {s.targets[0].id: _literal(s.value) for s in statements
                  if isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name)}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        record.notes.append(
            f'{source} has a config that is no readable Python, or longer than {_LONGEST_PYTHON} characters: nothing '
            'was taken from it')
        return
    backbone = _dict(_dict(config.get('model')).get('backbone'))
    steps = {step['type']: step for step in config.get('test_pipeline') or () if _text(_dict(step).get('type'))}
    norm = _dict(steps.get('Normalize') or config.get('data_preprocessor') or config.get('img_norm_cfg'))
    if norm.get('to_rgb') is False:
        raise UserError(
            f'{source} says to_rgb=False: the model reads blue, green, red. Models here read red, green, blue; reverse '
            'the channels of the first layer before you convert it.')
    data: dict[str, Any] = {k: [round(v / 255, 6) for v in norm[k]] for k in ('mean', 'std') if norm.get(k)}
    resize = steps.get('ResizeEdge') or steps.get('Resize') or {}
    scale, size = (
        _pair(s.get('scale', s.get('size', s.get('crop_size')))) for s in (resize, steps.get('CenterCrop', {})))
    if scale:
        crop = dict(crop_pct=size[0] / scale[0]) if size else dict(crop_pct=1., crop_mode='squash')
        input_size = (backbone.get('in_channels', 3), *(size or scale))
        data.update(crop, interpolation=resize.get('interpolation', 'bilinear'), input_size=input_size)
    record.add(source, model_args=_given(_dict(backbone.get('layer_cfgs')), ('num_heads',)), data=data)


def _pair(size: Any) -> tuple[int, int] | None:
    # OpenMMLab has -1 for the longer side
    if isinstance(size, int):
        return size, size
    return (size[0], size[1] if size[1] > 0 else size[0]) if size else None
