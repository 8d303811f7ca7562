"""How timm builds a T2T-ViT: pretrained cfgs from the manifest, where weights come from, feature pyramids."""
from typing import Any, Dict, Tuple, Type

import torch.nn as nn
from timm.models._builder import build_model_with_cfg

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


def build_t2t_vit(model_cls: Type[nn.Module], variant: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a T2T-ViT, through timm, for an entrypoint.

    features_only=True gives the pyramid of strides 4, 8 and 16; feature_cls='getter' timm's view of the blocks.

    Args:
        model_cls: Class of the model.
        variant: Name of the architecture.
        pretrained: Load pretrained weights.
        **kwargs: Arguments of the model and of timm's builder.
    """
    feature_cls = kwargs.pop('feature_cls', None) or T2TFeaturePyramid
    out_indices = kwargs.pop('out_indices', (0, 1, 2) if feature_cls is T2TFeaturePyramid else 3)
    return build_model_with_cfg(
        model_cls, variant, pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls=feature_cls),
        **kwargs,
    )
