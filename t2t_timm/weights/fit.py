"""Make a state dict fit a model: names, architecture, input channels and position grid."""
import logging
import math
import re
from functools import lru_cache
from typing import Any

import torch
import torch.nn as nn
from timm.layers import resample_abs_pos_embed, to_2tuple
from timm.models import list_models, model_entrypoint

from ..errors import printable, require_new_timm
from ..layers import SOFT_SPLITS, join_positions, tokens_grid_size
from .manifest import load_manifest, pretrained_cfg
from .names import find_weights, first_names, rename

_logger = logging.getLogger(__name__)

__all__ = [
    'FIRST_LAYERS', 'adapt_stem', 'checkpoint_filter_fn', 'first_layer', 'fit_state_dict', 'input_channels',
    'looks_like',
]

PATCH_SIZE = SOFT_SPLITS[0][0] ** 2  # pixels in a patch of the first soft split

FIRST_LAYERS = {  # by token type, the layer that reads the image
    'performer': 'patch_embed.attention1.kqv',
    'transformer': 'patch_embed.attention1.attn.qkv',
    'convolution': 'patch_embed.soft_split0',
}


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


def _renamed(checkpoint: dict[str, Any]) -> dict[str, Any]:
    weights, notes = find_weights(checkpoint)
    if notes:
        _logger.info(printable(f'Loading {"; ".join(notes)}.'))
    return weights


def adapt_stem(state_dict: dict[str, torch.Tensor], in_chans: int) -> dict[str, torch.Tensor]:
    """Adapt the layer that reads the image to another number of channels, as timm adapts a convolution.

    More channels repeat the checkpoint's, the weights scaled down. For one channel the weights are summed, and a grey
    image gives what its repetition over the checkpoint's channels gave, exactly: repeated values have the mean and
    variance of one copy, and with n the normalized patch of one channel (which sums to zero), G_c, b_c the norm's gain
    and bias of channel c and W_c the linear map's columns, A = sum_c W_c G_c and d = sum_c W_c b_c,

        sum_c W_c (G_c n + b_c)  =  A n + d  =  (A + (d - A 1) 1' / p) (n + 1)

    for p pixels per patch: a linear map without a bias of its own can carry d if the norm's gain and bias are ones.
    The token transformer's attention scale follows the input width, so its queries are rescaled.
    """
    base_chans, key, state_dict = input_channels(state_dict), first_layer(state_dict), dict(state_dict)
    weight = state_dict[f'{key}.weight']
    shape, dtype, device = weight.shape, weight.dtype, weight.device
    weight = weight.cpu().double().reshape(shape[0], base_chans, PATCH_SIZE)  # some devices have no float64
    norms = [k for k in ('patch_embed.attention1.norm1.weight', 'patch_embed.attention1.norm1.bias') if k in state_dict]
    if in_chans > 1:
        index = torch.arange(in_chans) % base_chans
        weight = weight[:, index] * (base_chans / in_chans)
        for k in norms:
            state_dict[k] = state_dict[k].reshape(base_chans, PATCH_SIZE)[index].flatten()
    elif norms:
        gain, bias = (state_dict[k].cpu().double().reshape(base_chans, PATCH_SIZE) for k in norms)
        shift = (weight * bias).sum(dim=(1, 2))
        weight = (weight * gain).sum(dim=1)
        weight = weight + (shift - weight.sum(dim=1)).unsqueeze(1) / PATCH_SIZE
        state_dict.update({k: state_dict[k].new_ones(PATCH_SIZE) for k in norms})
    else:
        weight = weight.sum(dim=1)
    weight = weight.reshape(shape[0], -1)
    if key == FIRST_LAYERS['transformer']:
        weight[:shape[0] // 3] *= math.sqrt(in_chans / base_chans)
    if len(shape) == 4:
        weight = weight.reshape(shape[0], in_chans, *shape[2:])
    state_dict[f'{key}.weight'] = weight.to(dtype).to(device)
    _logger.info(f'Adapted {key} from {base_chans} to {in_chans} input channels.')
    return state_dict


# These depend on the image size and the input channels rather than on the architecture.
_ADAPTED = re.compile(r'patch_embed\.(attention1\.(norm1|kqv|attn\.qkv)|soft_split0)\.(weight|bias)')
_OPTIONAL = re.compile(r'(head|attn_pool)\.|(cls|reg)_token$|pos_embed$')


def _shapes(state_dict: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    # An adapted tensor keeps its name; tensors that depend on options of the model may be missing.
    return {
        k: () if _ADAPTED.fullmatch(k) else tuple(getattr(v, 'shape', ()))
        for k, v in state_dict.items() if not _OPTIONAL.match(k)}


@lru_cache(maxsize=None)
def _usual(architecture: str) -> tuple[dict[str, tuple[int, ...]], tuple[int, ...]]:
    # The shapes of an architecture, and that of its position table.
    state_dict = model_entrypoint(architecture)(device='meta').state_dict()
    return _shapes(state_dict), state_dict['pos_embed'].shape


def looks_like(state_dict: dict[str, Any], preferred: str | None = None) -> str | None:
    """Return the architecture that fits the names and shapes of weights under the models' names, or None.

    If several fit, it is the preferred one, or else one whose image size fits too.
    """
    shapes, table = _shapes(state_dict), getattr(state_dict.get('pos_embed'), 'shape', ())
    fitting = [architecture for architecture in list_models('*t2t_vit*') if _usual(architecture)[0] == shapes]
    return preferred if preferred in fitting else next(
        (architecture for architecture in fitting if _usual(architecture)[1] == table), next(iter(fitting), None))


def _no_t2t_vit(state_dict: dict[str, Any]) -> ValueError:
    return ValueError(
        'This checkpoint is not a T2T-ViT: it has no tokens-to-token module; its names begin with '
        f'{first_names(state_dict)}. Nothing was loaded.')


def _check_architecture(state_dict: dict[str, Any], model: nn.Module) -> None:
    # Nothing is said of a model of the user's own making: load_state_dict says best what does not fit it.
    own = model.state_dict()
    if first_layer(state_dict) is None and any(k.startswith('patch_embed.') and k not in own for k in state_dict):
        raise _no_t2t_vit(state_dict)
    if _shapes(state_dict) == _shapes(own):
        return
    architecture = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    found = looks_like(state_dict, architecture)
    if found not in (None, architecture):
        raise ValueError(
            f'This checkpoint looks like {found}, not like {architecture or "this model"}. Nothing was loaded.')


def _fit_positions(state_dict: dict[str, torch.Tensor], model: Any, came_with_cfg: bool = False) -> None:
    """Make the position table (1, 1 + N, C) of a state dict fit a model's grid, in place, resampled bicubically.

    A table does not say whether its N positions are 4 x 9 or 6 x 6. Known are the grids of the model, of its pretrained
    cfg (which goes first if it is the checkpoint's too), and of the published files. Nor does a table say how many
    prefix tokens it has: as many as the model's, or the class token alone, as published.
    """
    table, own = state_dict.get('pos_embed'), model.pos_embed
    if table is None or own is None:
        return
    if model.has_class_token and 'cls_token' not in state_dict and table.shape != own.shape and first_layer(state_dict):
        raise ValueError(
            'The checkpoint has no class token (cls_token), and this model has one. Create the model with '
            'class_token=False and with the global_pool that the checkpoint was trained with, which no shape shows. '
            'Nothing was loaded.')
    if table.ndim != 3 or table.shape[2] != own.shape[2]:
        return  # load_state_dict says what is wrong with it
    img_size, grid_size = model.patch_embed.img_size, model.patch_embed.grid_size
    num_own = 0 if model.no_embed_class else model.num_prefix_tokens
    cfg_size = getattr(model, 'pretrained_model_args', {}).get('img_size')
    cfg_size = cfg_size or (getattr(model, 'pretrained_cfg', None) or {}).get('input_size', ())[-2:] or img_size
    sizes = (cfg_size, img_size) if came_with_cfg else (img_size, cfg_size)
    published = (pretrained_cfg(name)['input_size'][1:] for name in load_manifest()['weights'])
    grids = [tokens_grid_size(to_2tuple(size)) for size in (*sizes, *published)]
    num_prefix, grid = next(
        ((n, grid) for n in (num_own, 1) for grid in grids if n + math.prod(grid) == table.shape[1]), (0, None))
    if grid is None:
        num_tokens = table.shape[1] - num_own
        raise ValueError(
            f'The checkpoint has positions of {num_tokens} tokens, this model of {grid_size[0]} x {grid_size[1]}, and '
            f'nothing says which rows and columns the {num_tokens} form. Create the model with the img_size that the '
            f'checkpoint was trained with, load it, and then call set_input_size({img_size}).')
    if grid != grid_size:
        table = resample_abs_pos_embed(
            table, list(grid_size), old_size=list(grid), num_prefix_tokens=num_prefix, verbose=True)
    if num_prefix != num_own:
        table = join_positions(table, model.has_class_token, model.num_reg_tokens, model.no_embed_class)
    state_dict['pos_embed'] = table


def checkpoint_filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, torch.Tensor]:
    """Make a checkpoint that timm has read for a model fit it: names, input channels and position grid.

    Raises:
        ValueError: The checkpoint is another architecture's, or no T2T-ViT's, or its position grid is not known.
    """
    state_dict = _renamed(state_dict)
    if first_layer(state_dict) is None:
        raise _no_t2t_vit(state_dict)
    if input_channels(state_dict) not in (0, model.in_chans):
        require_new_timm(f'Adapting pretrained weights to in_chans={model.in_chans}')  # older releases adapt too
        state_dict = adapt_stem(state_dict, model.in_chans)
    _check_architecture(state_dict, model)
    if not model.has_class_token:
        state_dict.pop('cls_token', None)
    _fit_positions(state_dict, model, came_with_cfg=True)
    return state_dict


def fit_state_dict(state_dict: dict[str, Any], model: Any, prefix: str = '') -> None:
    """Make what load_state_dict was given fit a model, in place: any route may bring an official file.

    timm's loaders hand over a whole checkpoint if they do not know the key of its weights, as 'net' of the authors'
    fine-tuned files. The names of the model begin with `prefix` if it is one of several modules.

    Raises:
        ValueError: As `checkpoint_filter_fn`.
    """
    rename(state_dict, prefix)
    if not prefix and first_layer(state_dict) is None and any(isinstance(v, dict) for v in state_dict.values()):
        weights = _renamed(state_dict)
        state_dict.clear()
        state_dict.update(weights)
    given = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    if any(k in given and given[k].shape != p.shape for k, p in model.named_parameters() if k != 'pos_embed'):
        _check_architecture(given, model)
    _fit_positions(given, model)
    if 'pos_embed' in given:
        state_dict[f'{prefix}pos_embed'] = given['pos_embed']
