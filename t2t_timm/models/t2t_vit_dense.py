"""T2T-ViT-Dense: blocks that append to the channels of the tokens (paper section 4.3, after DenseNet)."""
from typing import Any, Dict, Optional, Tuple

import torch
import torch.nn as nn
from timm.layers import calculate_drop_path_rates
from timm.models import generate_default_cfgs

from ..layers import Block
from ._builder import build_t2t_vit, pretrained_cfgs
from ._registry import register_model
from .t2t_vit import T2TViT

__all__ = ['T2TViTDense']


class DenseBlock(Block):
    """Block whose output, narrowed to growth_rate channels, is appended to its input."""

    def __init__(self, dim: int, growth_rate: int, device=None, dtype=None, **kwargs: Any) -> None:
        """Initialize the block of tokens of width dim; further arguments as timm's Block has them."""
        dd = {'device': device, 'dtype': dtype}
        super().__init__(dim, **kwargs, **dd)
        self.dense_linear = nn.Linear(dim, growth_rate, **dd)

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Map tokens (B, N, dim) to (B, N, dim + growth_rate)."""
        y = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        y = y + self.drop_path2(self.ls2(self.mlp(self.norm2(y))))
        return torch.cat([x, self.dense_linear(y)], dim=-1)

    def class_token(self, x: torch.Tensor) -> torch.Tensor:
        """Return `self(x)[:, :1]`: tokens (B, N, dim) to the class token (B, 1, dim + growth_rate)."""
        return torch.cat([x[:, :1], self.dense_linear(super().class_token(x))], dim=-1)


class Transition(nn.Module):
    """Linear and GELU that halve the channels between two groups of dense blocks."""

    def __init__(self, dim: int, dim_out: int, device=None, dtype=None) -> None:
        """Initialize the transition of dim to dim_out channels."""
        super().__init__()
        self.linear = nn.Linear(dim, dim_out, device=device, dtype=dtype)
        self.act = nn.GELU()

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: Optional[torch.Tensor] = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Map tokens (B, N, dim) to (B, N, dim_out); the mask is for the blocks around it."""
        return self.act(self.linear(x))


class T2TViTDense(T2TViT):
    """T2T-ViT with densely connected blocks; transitions stand in `blocks` between the groups."""

    def __init__(
            self,
            growth_rate: int = 64,
            block_config: Tuple[int, ...] = (3, 6, 6, 4),
            embed_dim: int = 128,
            num_heads: int = 8,
            mlp_ratio: float = 2.,
            **kwargs: Any,
    ) -> None:
        """Initialize the model.

        Args:
            growth_rate: Channels that each block appends.
            block_config: Number of blocks of each group.
            embed_dim: Width of the tokens that enter the first block.
            num_heads: Number of attention heads.
            mlp_ratio: Ratio of an MLP's hidden width to its input.
            **kwargs: As T2TViT has them.
        """
        # plain attributes may stand before nn.Module is initialized, and _make_blocks needs them
        object.__setattr__(self, 'growth_rate', growth_rate)
        object.__setattr__(self, 'block_config', block_config)
        super().__init__(
            embed_dim=embed_dim, depth=sum(block_config), num_heads=num_heads, mlp_ratio=mlp_ratio, **kwargs)

    def _make_blocks(self, depth: int, drop_path_rate: float, kwargs: Dict[str, Any]) -> nn.Sequential:
        rates = iter(calculate_drop_path_rates(drop_path_rate, depth))
        dim = self.embed_dim
        dd = {k: kwargs[k] for k in ('device', 'dtype')}
        blocks, widths = [], []
        for i, num_blocks in enumerate(self.block_config):
            if i > 0:
                blocks.append(Transition(dim, dim // 2, **dd))
                dim = dim // 2
                widths.append(dim)
            for _ in range(num_blocks):
                blocks.append(DenseBlock(dim, self.growth_rate, drop_path=next(rates), **kwargs))
                dim += self.growth_rate
                widths.append(dim)
        self.feature_info = [dict(module=f'blocks.{i}', num_chs=w, reduction=16) for i, w in enumerate(widths)]
        return nn.Sequential(*blocks)


default_cfgs = generate_default_cfgs(pretrained_cfgs('t2t_vit_dense'))


@register_model
def t2t_vit_dense(pretrained: bool = False, **kwargs: Any) -> T2TViTDense:
    """T2T-ViT-Dense, performer tokens."""
    model_args = dict(growth_rate=64, block_config=(3, 6, 6, 4), embed_dim=128, num_heads=8, mlp_ratio=2.)
    return build_t2t_vit(T2TViTDense, 't2t_vit_dense', pretrained, **dict(model_args, **kwargs))
