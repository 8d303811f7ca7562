"""The record of a checkpoint: what the model was and what it was fed, as far as files say it, and which one said it."""
import argparse
import ast
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models import get_pretrained_cfg, is_model

from ..errors import UserError

__all__ = ['PREPROCESSING', 'Record', 'read_config', 'record_of']

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
_LARGEST = 1 << 20  # bytes of a config.json
_WIDEST = 16  # times that an image may be resized beyond the size that a model reads


@dataclass
class Record:
    """What files say of a model; `sources` says of each entry which one said it.

    Attributes:
        model: What the run began with, as timm.create_model takes it: architecture.tag, local-dir:DIR, hf-hub:REPO.
        model_args: Arguments of the model's entrypoint that differ from its defaults.
        data: Preprocessing, as timm's data config has it.
        label_names: Names of the classes.
        timm_order: The classes are numbered as timm's train.py does it.
        class_map: File that numbered the classes instead of their folders, or ''.
    """
    model: str = ''
    model_args: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    label_names: list[str] | None = None
    timm_order: bool = False
    class_map: str = ''
    sources: dict[str, str] = field(default_factory=dict)

    def add(self, source: str, model: str = '', label_names: Any = None, **entries: dict[str, Any]) -> None:
        """Take what a further source says and no earlier one did.

        Raises:
            UserError: An entry is not of the kind that it has to be, or cannot stand in a config.json.
        """
        self.model = self.model or model
        if label_names is not None and self.label_names is None:
            if not isinstance(label_names, (list, tuple)) or not all(isinstance(n, str) for n in label_names):
                raise UserError(f'{source} should name the classes in a list of texts, not {label_names!r}.')
            self.label_names = list(label_names)
            self.sources['label_names'] = source
        for kind, values in entries.items():
            if not isinstance(values, dict):
                raise UserError(f'{source} should have its {kind} as names with values, not {values!r}.')
            mine = getattr(self, kind)
            for key, value in values.items():
                if not _is_plain(value):
                    raise UserError(
                        f'{source} has {key}={value!r}, which a config.json cannot hold: it should be a number, a '
                        'text, a truth value, or a list of these.')
                if key not in mine:
                    mine[key] = value
                    self.sources[key] = source

    def told(self) -> list[str]:
        """Return, for each source, what was taken from it."""
        values = {**self.model_args, **self.data, 'label_names': f'{len(self.label_names or ())} names'}
        by_source: dict[str, list[str]] = {}
        for key, source in self.sources.items():
            by_source.setdefault(source, []).append(f'{key} {_shown(values[key])}')
        return [f'from {source}: {", ".join(entries)}' for source, entries in by_source.items()]


def _shown(value: Any) -> str:
    return ' '.join(map(_shown, value)) if isinstance(value, (list, tuple)) else f'{value}'


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, str)) or isinstance(value, float) and math.isfinite(value)


def _given(values: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    # train.py has None or '' for an option that was not typed
    return {k: values[k] for k in names if values.get(k) not in (None, '')}


def read_config(folder: Path, record: Record, source: str = 'config.json') -> bool:
    """Add what the config.json in a folder says, as timm and Transformers write it; return whether it is of a T2T-ViT.

    Raises:
        UserError: It is of a T2T-ViT, but it is damaged or an entry has a wrong kind.
    """
    path = folder / 'config.json'
    if not path.is_file():
        return False
    try:
        with open(path, encoding='utf-8') as f:
            config = json.loads(f.read(_LARGEST))
    except (ValueError, RecursionError) as e:
        raise UserError(f'{path} is not readable JSON: {e}.') from e
    if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
        return False
    cfg = config.get('pretrained_cfg') or {}
    if not isinstance(cfg, dict):
        raise UserError(f'{path} should have its pretrained_cfg as names with values, not {cfg!r}.')
    args = config.get('model_args') or {}
    record.add(
        source,
        model='.'.join(filter(None, (config['architecture'], _text(cfg.get('tag'))))),
        label_names=config.get('label_names', cfg.get('label_names')),
        model_args=_function(args) if isinstance(args, dict) else args,
        data=_given(cfg, PREPROCESSING),
    )
    if config.get('global_pool'):
        record.add(source, model_args={'global_pool': config['global_pool']})
    return True


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ''


def _function(model_args: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in model_args.items() if not _TRAINING.fullmatch(k)}


def record_of(loaded: dict[Any, Any], folder: Path) -> tuple[Record, list[str]]:
    """Return the record of what a checkpoint file held, and notes.

    The first source that says something is believed: the config.json beside the file, the run's own arguments (timm's,
    Lightning's, mmengine's), the pretrained cfg of what the run started from. Nothing is asked of a network.

    Args:
        loaded: What the file held.
        folder: Folder of the file.

    Raises:
        UserError: An entry cannot be kept.
    """
    record, notes = Record(), []
    read_config(folder, record)
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
        if not start.startswith('local-dir:'):
            notes.append(f'the run started from {start}, which was not asked how it preprocesses images')
        elif not read_config(Path(start.removeprefix('local-dir:')), record, f'{start}, which the run started from'):
            notes.append(f'the run started from {start}, which is no longer there: its preprocessing is not known')
        record.label_names = None if record.sources.get('label_names', '').startswith(start) else record.label_names
    if is_model(record.model) and (cfg := get_pretrained_cfg(record.model)) is not None:
        record.add(f"{record.model}'s pretrained cfg", data=_given(cfg.to_dict(), PREPROCESSING[1:]))
    return record, notes


def _add_arguments(record: Record, args: dict[str, Any], source: str) -> None:
    kwargs = next((args[k] for k in ('model_kwargs', 'model_args') if args.get(k)), {})
    if not isinstance(kwargs, dict):
        raise UserError(f'{source} should have model_kwargs as names with values, not {kwargs!r}.')
    data = _given(args, PREPROCESSING)
    channels = args.get('in_chans') or kwargs.get('in_chans') or 3
    size = data.pop('input_size', None) or args.get('img_size')
    if size:
        sizes = (size, size) if isinstance(size, int) else tuple(size)
        data['input_size'] = sizes if len(sizes) == 3 else (channels, *sizes)
        channels = data['input_size'][0]
    mode = args.get('input_img_mode')
    if mode and (mode, channels) not in (('RGB', 3), ('L', 1)):
        raise UserError(
            f'{source} have input_img_mode={mode!r}: images are read as RGB here, or as L by a model of one channel.')
    names = [_text(args.get(k)) for k in ('model', 'model_name', 'architecture', 'arch')]
    own = {k: args[k] for k in _FUNCTION if args.get(k) is not None}
    record.add(
        source,
        model=next((n for n in names if 't2t_vit' in n or ':' in n), ''),
        model_args=({'global_pool': args['gp']} if args.get('gp') else {}) | own | _function(kwargs),
        data=data,
    )
    record.class_map = _text(args.get('class_map'))


def _literal(node: ast.AST) -> Any:
    """Return the value of Python's text, which is not run: plain values, and dict() of them; None for all else."""
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
    dataset = meta.get('dataset_meta')
    record.add(source, label_names=dataset.get('classes') if isinstance(dataset, dict) else meta.get('CLASSES'))
    try:
        statements = ast.parse(_text(meta.get('cfg') or meta.get('config'))).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    config = {s.targets[0].id: _literal(s.value) for s in statements
              if isinstance(s, ast.Assign) and isinstance(s.targets[0], ast.Name)}
    backbone = config.get('model', {}).get('backbone', {})
    layers = backbone.get('layer_cfgs') or {}
    steps = {step['type']: step for step in config.get('test_pipeline') or () if step and 'type' in step}
    norm = steps.get('Normalize') or config.get('data_preprocessor') or config.get('img_norm_cfg') or {}
    if norm.get('to_rgb') is False:
        raise UserError(
            f'{source} says to_rgb=False: the model reads blue, green, red. Models here read red, green, blue; reverse '
            'the channels of the first layer before you convert it.')
    data = {k: [round(v / 255, 6) for v in norm[k]] for k in ('mean', 'std') if norm.get(k)}
    resize, crop = (next((steps[k] for k in kinds if k in steps), {}) for kinds in (
        ('ResizeEdge', 'Resize'), ('CenterCrop',)))
    scale, size = (_pair(step.get('scale', step.get('size', step.get('crop_size')))) for step in (resize, crop))
    if scale:
        data.update(interpolation=resize.get('interpolation', 'bilinear'))
        data.update(crop_pct=size[0] / scale[0]) if size else data.update(crop_pct=1., crop_mode='squash')
        data.update(input_size=(backbone.get('in_channels', 3), *(size or scale)))
    record.add(source, model_args=_given(layers, ('num_heads',)), data=data)


def _pair(size: Any) -> tuple[int, int] | None:
    # OpenMMLab has -1 for the longer side
    if isinstance(size, int):
        return size, size
    return (size[0], size[1] if size[1] > 0 else size[0]) if size else None
