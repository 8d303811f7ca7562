"""Which tensors of a checkpoint are a T2T-ViT's, whatever its training code wrapped around them, and their names."""
import math
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch

__all__ = ['abbreviate', 'find_weights', 'first_names', 'rename']

_DEPTH = 6  # dicts inside dicts
_LONGEST = 256  # characters of a name; a short file can hold a long one in many dicts

# What wraps a module inside another writes itself into the names: DDP, torch.compile, FSDP, activation checkpointing.
_WRAPPED = re.compile(r'(?<=\.)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.')

# The layer that reads the image, under official names, the models' or PaddleViT's.
_FIRST_LAYER = re.compile(
    r'(|.*\.)(?:tokens_to_token|patch_embed)\.(?:att(?:entio)?n1\.(?:kqv|attn\.qkv)|soft_split0)\.weight')

# If a checkpoint holds several models, the first kind of key that is there decides: averaged weights, then timm's keys.
_ORDER = [re.compile(rf'(?:{key})(?:\..*)?') for key in (
    'state_dict_ema', 'model_ema', r'(?:.*[._])?(?:ema|swa)(?:_[^.]*)?', 'state_dict', 'model')]

# What only the names of a kind hold, and the replacements, in this order, that turn them into the models' or official.
_FOREIGN = {
    "OpenMMLab's names": ('.ffn.layers.0.0.', (
        (r'^encoder\.', 'blocks.'),
        (r'\.ln(\d)\.', r'.norm\1.'),
        (r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'),
        (r'\.ffn\.layers\.1\.', '.mlp.fc2.'),
    )),
    "PaddleViT's names": ('patch_embed.attn1.', (
        (r'^patch_embed\.attn(\d)\.', r'patch_embed.attention\1.'),
        (r'^patch_embed\.proj\.', 'patch_embed.project.'),
    )),
}


def abbreviate(names: Iterable[str]) -> str:
    """Return the first three names, and how many more there are."""
    names = list(names)
    return ', '.join(names[:3]) + (f' and {len(names) - 3} more' if len(names) > 3 else '')


def _is_name(key: Any) -> bool:
    return isinstance(key, str) and len(key) <= _LONGEST


def _dicts(checkpoint: dict[Any, Any]) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yield each dict inside a checkpoint once, with what its names begin with, as 'state_dict.'."""
    level, seen = [('', checkpoint)], {id(checkpoint)}
    for _ in range(_DEPTH):
        yield from level
        inner = {
            id(value): (f'{path}{key}.', value) for path, outer in level for key, value in outer.items()
            if isinstance(value, dict) and _is_name(key) and id(value) not in seen}
        seen |= inner.keys()
        level = list(inner.values())


def _tensors(outer: dict[Any, Any]) -> dict[str, Any]:
    # n_averaged counts what torch's AveragedModel has averaged
    return {
        _WRAPPED.sub('', k): v for k, v in outer.items() if _is_name(k) and k != 'n_averaged' and hasattr(v, 'ndim')}


def first_names(checkpoint: dict[Any, Any]) -> str:
    """Return the names that a checkpoint begins with: of its tensors or, if it has none, of whatever it holds."""
    tensors = (f'{path}{name}' for path, outer in _dicts(checkpoint) for name in _tensors(outer))
    return ', '.join(list(islice(tensors, 3)) or islice(filter(_is_name, checkpoint), 3)) or 'nothing'


def _models(checkpoint: dict[Any, Any]) -> dict[str, tuple[dict[str, Any], str]]:
    """Return the tensors that T2T-ViTs stand among, and the prefix of each one's names, by keys as 'model.teacher'."""
    models = {}
    for path, outer in _dicts(checkpoint):
        tensors = _tensors(outer)
        for match in filter(None, map(_FIRST_LAYER.fullmatch, tensors)):
            models[_WRAPPED.sub('', f'{path}{match[1]}').rstrip('.')] = tensors, match[1]
    return models


def _shown(keys: Iterable[str]) -> str:
    return abbreviate(repr(key) if key else 'no key' for key in keys)


def _choose(keys: Iterable[str], key: str | None, swapped: bool) -> str:
    """Return the key of the model that is asked for (or what it begins with), or of the only or averaged one.

    With swapped, mmengine wrote the file: its EMAHook saves the averaged weights as state_dict, where evaluation looks
    for them, and the others as ema_state_dict.
    """
    left = [k for k in keys if key is None or f'{k}.'.startswith(f'{key}.')]
    if not left:
        raise ValueError(f'This checkpoint holds no T2T-ViT under {key!r}, but under {_shown(keys)}.')
    if swapped:
        left = [k for k in left if not k.startswith('ema_state_dict')] or left
    best = next(filter(None, ([k for k in left if rule.fullmatch(k)] for rule in _ORDER)), left)
    if len(best) > 1:
        raise ValueError(
            f'This checkpoint holds {len(left)} T2T-ViTs, under {_shown(left)}: choose one, as in `t2t-timm '
            f'convert FILE --key {best[-1]}`. Nothing was loaded.'
        )
    return best[0]


def find_weights(checkpoint: dict[Any, Any], key: str | None = None) -> tuple[dict[Any, Any], list[str]]:
    """Return the weights of the T2T-ViT in a checkpoint under the names of the models, and notes of what was taken.

    They are what stands beside the tokens-to-token module: inside whatever dicts, behind whatever prefix of the names,
    without token labeling's auxiliary head. A checkpoint without such a module is returned as it is.

    Of several models the one under `key` is taken, as 'teacher' or 'state_dict.backbone', or else the averaged one.

    Raises:
        ValueError: Nothing says which of several models to take, there is none under the key, or names of two kinds.
    """
    models = _models(checkpoint)
    if not models:
        return dict(checkpoint), []
    chosen = _choose(models, key, swapped='message_hub' in checkpoint)
    tensors, prefix = models.pop(chosen)
    notes = [f'weights under {chosen}' + (f', leaving {abbreviate(models)} aside' if models else '')] if chosen else []
    # mmcv's EMAHook keeps a buffer per parameter. At the end of an epoch it swaps the two, for evaluation and for the
    # file, which therefore has the averaged weights under the plain names.
    buffers = {f'ema_{name.replace(".", "_")}' for name in tensors} & tensors.keys()
    if buffers:
        notes.append(
            f"averaged weights, as mmcv's EMAHook leaves them after an epoch; its {len(buffers)} buffers left out")
    others = tuple(p for d, p in models.values() if d is tensors)
    inner = tuple(p for p in others if p.startswith(prefix))
    weights, rest = {}, {}
    for name in [k for k in tensors if k not in buffers]:
        if name.startswith(prefix) and not name.startswith(inner):
            weights[name[len(prefix):]] = tensors[name]
        elif not name.startswith(others):
            rest[name] = tensors[name]
    head = prefix.removesuffix('backbone.') + 'head.layers.head.'
    for kind, (mark, replacements) in _FOREIGN.items():
        if any(mark in name for name in weights):
            notes.append(kind)
            for pattern, name in replacements:
                weights = {re.sub(pattern, name, k): v for k, v in weights.items()}
            weights.update({f'head.{k[len(head):]}': rest.pop(k) for k in list(rest) if k.startswith(head)})
    if rest:
        notes.append(f'{abbreviate(rest)} left out')
    aux = rename(weights)
    if aux:
        notes.append(f'auxiliary head of token labeling left out ({", ".join(aux)})')
    if "OpenMMLab's names" in notes:
        notes += _usual_scale(weights, checkpoint.get('meta'))
    return weights, notes


def _usual_scale(weights: dict[str, Any], meta: Any) -> list[str]:
    """Scale, in place, queries that mmpretrain trained with attention times sqrt(h), h the width of a head.

    mmpretrain 1.0.0rc7 to 1.2.0 does so wherever a scale is given, and T2T-ViT gives one; here, and in mmcls before it,
    attention is over sqrt(d): d = h in the blocks, the input width in the tokens. So the queries become sqrt(h d) times
    as large. The config in the file's meta says who trained it, and h; if it does not say h, that is 64 in the blocks.
    """
    config = meta.get('cfg') or meta.get('config') if isinstance(meta, dict) else None
    if not isinstance(config, str):  # timm's own loaders take the state dict out first
        return ['nothing says that mmpretrain 1.0.0rc7 or later trained it, whose attention has another scale']
    if not re.search(r'default_scope\W+mmpretrain\b', config):
        return []
    num_heads = int((re.search(r'num_heads\W+(\d{1,4})\b', config) or [0, 0])[1])
    for name, weight in list(weights.items()):
        if re.search(r'\battn\.qkv\.(weight|bias)$', name):
            if not isinstance(weight, torch.Tensor) or weight.layout != torch.strided or weight.is_nested or (
                    not weight.ndim or not weight.is_contiguous()):
                raise ValueError(f'{name} is not a plain matrix of numbers. Nothing was loaded.')
            queries = weight.shape[0] // 3
            width = queries // (num_heads or max(queries // 64, 1))
            factor = width if name.startswith('blocks.') else math.sqrt(queries * weight.shape[-1])
            weights[name] = torch.cat([weight[:queries].float() * factor, weight[queries:].float()])
    return ["mmpretrain's scale of the attention, sqrt(head width), moved into the queries"]


def rename(state_dict: dict[str, Any], prefix: str = '') -> list[str]:
    """Give the official names, tokens_to_token.*, as patch_embed.*, in place, and take the auxiliary head out.

    Returns the names of that head, which token labeling trains. All names of the model begin with `prefix`.

    Raises:
        ValueError: The state dict has both kinds of names.
    """
    official = [k for k in state_dict if k.startswith(f'{prefix}tokens_to_token.')]
    if official and any(k.startswith(f'{prefix}patch_embed.') for k in state_dict):
        raise ValueError(
            f'The state dict names the tokens-to-token module twice, {prefix}tokens_to_token.* and '
            f'{prefix}patch_embed.*: keep one of them. Nothing was loaded.'
        )
    for name in official:
        state_dict[f"{prefix}patch_embed.{name[len(prefix) + len('tokens_to_token.'):]}"] = state_dict.pop(name)
    aux = [k for k in state_dict if k.startswith(f'{prefix}aux_head.')]
    return [name for name in aux if state_dict.pop(name) is not None]
