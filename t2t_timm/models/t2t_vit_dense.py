"""T2T-ViT-Dense: blocks that append to the channels of the tokens (paper section 4.3, after DenseNet)."""
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn as nn
from timm.models import generate_default_cfgs

from ..layers import Block
from ._builder import build_t2t_vit, pretrained_cfgs
from ._registry import register_model
from .t2t_vit import T2TViT

__all__ = ['T2TViTDense']


class DenseBlock(Block):
    """Block whose output, narrowed to growth_rate channels, is appended to its input."""
    # timm's forward under a name of its own, as TorchScript knows no super()
    _block = FunctionType(Block.forward.__code__, Block.forward.__globals__, '_block', Block.forward.__defaults__)

    def __init__(self, dim: int, growth_rate: int, device=None, dtype=None, **kwargs: Any) -> None:
        """Initialize the block of tokens of width dim; further arguments as timm's Block has them."""
        dd = {'device': device, 'dtype': dtype}
        super().__init__(dim, **kwargs, **dd)
        self.dense_linear = nn.Linear(dim, growth_rate, **dd)

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Map tokens (B, N, dim) to (B, N, dim + growth_rate)."""
        return torch.cat([x, self.dense_linear(self._block(x, attn_mask, is_causal))], dim=-1)

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
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Map tokens (B, N, dim) to (B, N, dim_out); the mask is for the blocks around it."""
        return self.act(self.linear(x))


class T2TViTDense(T2TViT):
    """T2T-ViT with densely connected blocks; `blocks` holds the transitions between the groups too."""

    def __init__(
            self,
            growth_rate: int = 64,
            block_config: tuple[int, ...] = (3, 6, 6, 4),
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
        super().__init__(
            embed_dim=embed_dim,
            depth=sum(block_config),
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            make_blocks=partial(dense_blocks, growth_rate=growth_rate, block_config=block_config),
            **kwargs,
        )
        self.growth_rate = growth_rate
        self.block_config = block_config


def dense_blocks(
        dim: int,
        drop_path_rates: list[float],
        growth_rate: int,
        block_config: tuple[int, ...],
        device=None,
        dtype=None,
        **kwargs: Any,
) -> tuple[nn.Sequential, list[int]]:
    """Return groups of dense blocks with transitions between them, and the widths of the tokens behind each of these.

    Args:
        dim: Width of the tokens that enter the first block.
        drop_path_rates: Of each dense block.
        growth_rate: Channels that each dense block appends.
        block_config: Number of dense blocks of each group.
        **kwargs: Further arguments of a block.
    """
    dd = {'device': device, 'dtype': dtype}
    rates = iter(drop_path_rates)
    blocks: list[nn.Module] = []
    widths: list[int] = []
    for i, num_blocks in enumerate(block_config):
        if i > 0:
            blocks.append(Transition(dim, dim // 2, **dd))
            dim = dim // 2
            widths.append(dim)
        for _ in range(num_blocks):
            blocks.append(DenseBlock(dim, growth_rate, drop_path=next(rates), **kwargs, **dd))
            dim += growth_rate
            widths.append(dim)
    return nn.Sequential(*blocks), widths


default_cfgs = generate_default_cfgs(pretrained_cfgs('t2t_vit_dense'))


@register_model
def t2t_vit_dense(pretrained: bool = False, **kwargs: Any) -> T2TViTDense:
    """T2T-ViT-Dense, performer tokens."""
    model_args = dict(growth_rate=64, block_config=(3, 6, 6, 4), embed_dim=128, num_heads=8, mlp_ratio=2.)
    return build_t2t_vit(T2TViTDense, 't2t_vit_dense', pretrained, **dict(model_args, **kwargs))
