"""The official names in a state dict, and how the names of other frameworks and wrappers are mapped to them."""
import logging
import re
from typing import Any

from ..layers import SOFT_SPLITS

_logger = logging.getLogger(__name__)

__all__ = [
    'FIRST_LAYERS', 'PATCH_SIZE', 'first_layer', 'input_channels', 'official_names', 'pop_aux_head', 'rename_keys',
    'token_type', 'wrappers',
]

PATCH_SIZE = SOFT_SPLITS[0][0] ** 2  # of the first soft split, in pixels

FIRST_LAYERS = {  # the layer that reads the image, by token type
    'performer': 'tokens_to_token.attention1.kqv',
    'transformer': 'tokens_to_token.attention1.attn.qkv',
    'convolution': 'tokens_to_token.soft_split0',
}

_WRAPPERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')  # in timm's order of preference

# OpenMMLab's names, in order; the token transformer's attention and the backbone's share theirs
_OPENMMLAB = (
    (r'^backbone\.', ''),
    (r'^head\.layers\.head\.', 'head.'),
    (r'^encoder\.', 'blocks.'),
    (r'\.ln(\d)\.', r'.norm\1.'),
    (r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'),
    (r'\.ffn\.layers\.1\.', '.mlp.fc2.'),
)


def token_type(architecture: str) -> str:
    """Return what kind of tokens an architecture has by its name: t2t_vit_t_*, t2t_vit_c_*, or the performer's."""
    letter = architecture.removeprefix('t2t_vit_')[:2]
    return {'t_': 'transformer', 'c_': 'convolution'}.get(letter, 'performer')


def first_layer(state_dict: dict[str, Any]) -> str | None:
    """Return the name of the layer that reads the image, or None if a state dict has none of the known ones."""
    return next((name for name in FIRST_LAYERS.values() if f'{name}.weight' in state_dict), None)


def input_channels(state_dict: dict[str, Any]) -> int:
    """Return how many channels of an image a state dict reads, 0 if it does not say."""
    weight: Any = state_dict.get(f'{first_layer(state_dict)}.weight')
    ndim = getattr(weight, 'ndim', 0)
    if ndim == 2 and weight.shape[1] % PATCH_SIZE == 0:
        return weight.shape[1] // PATCH_SIZE
    return weight.shape[1] if ndim == 4 else 0


def wrappers(checkpoint: dict[str, Any]) -> list[str]:
    """Return the keys under which a checkpoint holds state dicts, averaged weights first, as timm prefers them."""
    return [key for key in _WRAPPERS if isinstance(checkpoint.get(key), dict)]


def official_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict without the prefixes of DDP and torch.compile, OpenMMLab's names as the official ones."""
    state_dict = {re.sub(r'^(module\.|_orig_mod\.)+', '', k): v for k, v in state_dict.items()}
    if any(k.startswith('backbone.') for k in state_dict):
        for pattern, name in _OPENMMLAB:
            state_dict = {re.sub(pattern, name, k): v for k, v in state_dict.items()}
    return state_dict


def pop_aux_head(state_dict: dict[str, Any], prefix: str = '') -> list[str]:
    """Take token labeling's auxiliary head, which the models do not have, out of a state dict; return its names."""
    names = [k for k in state_dict if k.startswith(f'{prefix}aux_head.')]
    for name in names:
        del state_dict[name]
    return names


def rename_keys(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return a state dict under the official names, without wrappers and without token labeling's auxiliary head.

    Args:
        checkpoint: A state dict, or a checkpoint that holds one.
    """
    keys = wrappers(checkpoint)
    state_dict = official_names(checkpoint[keys[0]] if keys else checkpoint)
    aux = pop_aux_head(state_dict)
    if aux:
        _logger.info(f'Leaving out the auxiliary head of token labeling ({", ".join(aux)}).')
    return state_dict
