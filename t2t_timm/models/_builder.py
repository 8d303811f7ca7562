"""How timm builds a T2T-ViT: pretrained cfgs from the manifest, where weights come from, feature pyramids."""
from typing import Any, Dict, Optional, Tuple, Type

import torch.nn as nn
from timm.models import get_pretrained_cfg
from timm.models._builder import build_model_with_cfg, resolve_pretrained_cfg

from ..hub.download import pretrained_file
from ..hub.manifest import load_manifest, pretrained_cfg
from ._checkpoint import checkpoint_filter_fn
from ._features import T2TFeaturePyramid

try:
    from timm.models._input import update_model_input_size as record_input_size
except ImportError:  # timm before 1.0.30 keeps no record of a resize
    def record_input_size(model: nn.Module, img_size: Tuple[int, int]) -> None:
        """Do nothing."""

_FIRST_LAYER = {  # of the architectures whose first linear layer is not the Performer's
    't2t_vit_c_14': 'tokens_to_token.soft_split0',
    't2t_vit_t_14': 'tokens_to_token.attention1.attn.qkv',
    't2t_vit_t_19': 'tokens_to_token.attention1.attn.qkv',
    't2t_vit_t_24': 'tokens_to_token.attention1.attn.qkv',
}


_SOURCE_KEYS = ('source', 'state_dict', 'file', 'url', 'hf_hub_id', 'hf_hub_filename')  # of a pretrained cfg


def pretrained_cfgs(*architectures: str) -> Dict[str, Dict[str, Any]]:
    """Return the pretrained cfgs of architectures: of each of their tags, or a plain one if they have no weights."""
    cfgs = {}
    for architecture in architectures:
        names = [name for name in load_manifest()['weights'] if name.split('.')[0] == architecture] or [architecture]
        for name in names:
            cfgs[name] = pretrained_cfg(name)
            if architecture in _FIRST_LAYER:
                cfgs[name]['first_conv'] = _FIRST_LAYER[architecture]
    return cfgs


def _manifest_name(variant: str, **cfg_args: Any) -> Optional[str]:
    """Return the architecture.tag whose weights timm would load, or None if the user has named another source."""
    cfg = resolve_pretrained_cfg(variant, **cfg_args)
    name = f'{cfg.architecture}.{cfg.tag}'
    if name not in load_manifest()['weights']:
        return None
    registered = get_pretrained_cfg(name)
    return name if all(getattr(cfg, k) == getattr(registered, k) for k in _SOURCE_KEYS) else None


def _forget_file(model: nn.Module) -> None:
    # a path of this machine has no place in a cfg that is saved and published
    for module in model.modules():
        if 'pretrained_cfg' in vars(module):
            module.pretrained_cfg.pop('file', None)


def build_t2t_vit(
        model_cls: Type[nn.Module],
        variant: str,
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        **kwargs: Any,
) -> nn.Module:
    """Build a T2T-ViT, through timm, for an entrypoint.

    features_only=True gives the pyramid of strides 4, 8 and 16; feature_cls='getter' timm's view of the blocks.
    The weights of a tag of the manifest are fetched and checked by `hub.download`; those of another source that the
    caller names (`hf-hub:`, `local-dir:`, file, url, state_dict) by timm itself.

    Args:
        model_cls: Class of the model.
        variant: Name of the architecture.
        pretrained: Load pretrained weights.
        pretrained_cfg: Tag or pretrained cfg, by default the architecture's first tag.
        pretrained_cfg_overlay: Entries that replace those of the pretrained cfg.
        **kwargs: Arguments of the model and of timm's builder.

    Raises:
        UserError: The weights could not be fetched, or are not what the manifest describes.
        ValueError: The checkpoint is another architecture's.
    """
    feature_cls = kwargs.pop('feature_cls', None) or T2TFeaturePyramid
    out_indices = kwargs.pop('out_indices', (0, 1, 2) if feature_cls is T2TFeaturePyramid else 3)
    cfg_args = dict(pretrained_cfg=pretrained_cfg, pretrained_cfg_overlay=pretrained_cfg_overlay)
    name = _manifest_name(variant, **cfg_args) if pretrained else None
    if name is not None:
        file = pretrained_file(name, kwargs.get('cache_dir'))
        cfg_args['pretrained_cfg_overlay'] = dict(pretrained_cfg_overlay or {}, file=str(file))
    model = build_model_with_cfg(
        model_cls, variant, pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls=feature_cls),
        **cfg_args,
        **kwargs,
    )
    if name is not None and get_pretrained_cfg(name).file is None:
        _forget_file(model)
    return model
