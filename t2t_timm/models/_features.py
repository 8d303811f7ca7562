"""The feature pyramid that T2T makes on its way from pixels to tokens: strides 4, 8 and 16, and 32 by pooling."""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
from timm.models import FeatureInfo, checkpoint


class T2TFeaturePyramid(nn.Module):
    """Maps at strides 4 and 8 from the tokens-to-token module, and at stride 16 the tokens that leave the last block.

    What `features_only=True` gives; without the modules that the chosen levels do not need. Level 3, for decoders made
    for backbones of four stages, is the map of stride 16 max-pooled (as in ViTDet, arXiv 2203.16527, section 3).
    """

    def __init__(self, model: Any, out_indices: int | Sequence[int] = (0, 1, 2)) -> None:
        """Wrap a model.

        Args:
            model: T2TViT to wrap.
            out_indices: Levels to return, of 0, 1, 2 and 3; the last n of the first three if int, to which negative
                levels refer too.

        Raises:
            ValueError: A level that is not there.
        """
        super().__init__()
        embed = model.patch_embed
        info = [
            dict(module=f'patch_embed.{embed.step_names[0]}', num_chs=embed.token_dim, reduction=4),
            dict(module=f'patch_embed.{embed.step_names[1]}', num_chs=embed.token_dim, reduction=8),
            dict(model.feature_info[-1]),
            dict(module='pool', num_chs=model.num_features, reduction=32),
        ]
        if isinstance(out_indices, int):
            levels = list(range(3 - out_indices, 3))
        else:
            levels = [i + 3 if i < 0 else i for i in out_indices]
        if not levels or not all(0 <= i < 4 for i in levels):
            raise ValueError(
                f'The feature pyramid has levels 0, 1, 2 and 3 (strides 4, 8, 16 and 32), not {out_indices}. '
                "For more, use feature_cls='getter': it gives the blocks."
            )
        self.out_indices = levels
        self.feature_info = FeatureInfo(info, tuple(levels))
        self.num_levels = min(max(levels) + 1, 3)
        self.pool = nn.MaxPool2d(2, ceil_mode=True) if 3 in levels else nn.Identity()
        model.prune_intermediate_layers([-1], prune_norm=True)
        for name in embed.step_names[self.num_levels:]:
            setattr(embed, name, nn.Identity())
        if self.num_levels < 3:  # only the tokens-to-token module is needed
            model.blocks, model.norm = nn.Sequential(), nn.Identity()
            model.cls_token = model.reg_token = model.pos_embed = None
        self.model = model

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing."""
        self.model.set_grad_checkpointing(enable)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Map images (B, in_chans, H, W) to the chosen levels, in the order chosen."""
        model = self.model
        levels = model.patch_embed.maps(model.patch_embed.check(x), self.num_levels)
        if self.num_levels > 2:
            B, _, H, W = levels[2].shape
            x = model.norm_pre(model._pos_embed(model.patch_embed.tokens(levels[2])))
            for block in model.blocks:
                x = checkpoint(block, x) if model.grad_checkpointing and not torch.jit.is_scripting() else block(x)
            levels[2] = x[:, model.num_prefix_tokens:].transpose(1, 2).reshape(B, -1, H, W)
            levels.append(self.pool(levels[2]))
        return [levels[i] for i in self.out_indices]
