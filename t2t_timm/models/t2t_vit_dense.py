"""T2T-ViT-Dense: blocks that append to the channels of the tokens (paper section 4.3, after DenseNet)."""
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerNorm, LayerType, fast_layer_norm
from timm.models import generate_default_cfgs
from timm.models.vision_transformer import Block

from ..weights.fit import FIRST_LAYERS
from ._builder import build_t2t_vit, pretrained_cfgs
from ._registry import register_model
from .t2t_vit import T2TViT, make_embed_layer

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
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Map tokens (B, N, dim) to (B, N, dim + growth_rate)."""
        # This repeats timm's block, since TorchScript knows no super().
        y = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        y = y + self.drop_path2(self.ls2(self.mlp(self.norm2(y))))
        return torch.cat([x, self.dense_linear(y)], dim=-1)


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


class FinalNorm(LayerNorm):
    """LayerNorm that skips tokens whose width differs: those of intermediate blocks."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, N, C) to (B, N, C)."""
        if not torch.jit.is_scripting():
            if isinstance(x, torch.fx.Proxy):  # fx knows no widths, and traces forward(): there the width fits
                return super().forward(x)
        if x.shape[-1] != self.normalized_shape[0]:
            return x
        if self._fast_norm:
            # timm passes its own tuple too.
            return fast_layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)  # type: ignore[arg-type]
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class T2TViTDense(T2TViT):
    """T2T-ViT with densely connected blocks; `blocks` holds the transitions between the groups too.

    The attribute embed_dim is the width of the tokens that leave the last block.
    """

    def __init__(
            self,
            growth_rate: int = 64,
            block_config: tuple[int, ...] = (3, 6, 6, 4),
            embed_dim: int = 128,
            num_heads: int = 8,
            mlp_ratio: float = 2.,
            norm_layer: LayerType | None = None,
            weight_init: str = '',
            **kwargs: Any,
    ) -> None:
        """Initialize the model.

        Args:
            growth_rate: Channels that each block appends.
            block_config: Number of blocks of each group.
            embed_dim: Width of the tokens that enter the first block.
            num_heads: Number of attention heads.
            mlp_ratio: Ratio of an MLP's hidden width to its input.
            norm_layer: As T2TViT has it.
            weight_init: As T2TViT has it.
            **kwargs: Further arguments of T2TViT.

        Raises:
            ValueError: block_fn, depth, fix_init or pre_norm, which the dense blocks do not have.
        """
        for name in ('block_fn', 'depth', 'fix_init', 'pre_norm'):
            if kwargs.get(name):
                raise ValueError(f'T2T-ViT-Dense has no {name}: block_config and growth_rate make its blocks.')
        dd: dict[str, Any] = {'device': kwargs.get('device'), 'dtype': kwargs.get('dtype')}
        dims, width = [], embed_dim
        for i, num_blocks in enumerate(block_config):
            width = width // 2 if i > 0 else width
            dims += [width + growth_rate * j for j in range(num_blocks)]
            width += growth_rate * num_blocks
        tokens = {name: kwargs.pop(name) for name in ('token_type', 'token_dim', 'token_drop_rate') if name in kwargs}
        make_embed = kwargs.pop('embed_layer', None) or make_embed_layer(**tokens)
        super().__init__(
            embed_dim=width,
            depth=len(dims),
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            embed_layer=lambda **args: make_embed(**dict(args, embed_dim=embed_dim)),
            norm_layer=norm_layer,
            block_fn=lambda dim, depth, **args: DenseBlock(dims[depth], growth_rate, depth=depth, **args),
            weight_init='skip',
            **kwargs,
        )
        self.growth_rate = growth_rate
        self.block_config = block_config
        self._narrow_stem(embed_dim)
        if norm_layer is None and isinstance(self.norm, nn.LayerNorm):
            self.norm = FinalNorm(width, eps=1e-5, **dd)
        self._insert_transitions(**dd)
        self.weight_init_mode = 'reset' if weight_init == 'skip' else weight_init
        if weight_init != 'skip':
            self.init_weights(needs_reset=False)

    def _narrow_stem(self, dim: int) -> None:
        """Give what enters the first block its own width, where timm's ViT has one width throughout."""
        for name in ('cls_token', 'reg_token', 'pos_embed'):
            old = getattr(self, name)
            if old is not None:
                new = old.new_empty(1, old.shape[1], dim)
                setattr(self, name, nn.Parameter(new, requires_grad=old.requires_grad))

    def _insert_transitions(self, **dd: Any) -> None:
        """Put a transition before each group of blocks but the first, and describe all in feature_info."""
        blocks: list[nn.Module] = []
        widths: list[int] = []
        block: Any
        for block in self.blocks:
            dim = block.dense_linear.in_features
            if widths and dim != widths[-1]:  # a group begins
                blocks.append(Transition(widths[-1], dim, **dd))
                widths.append(dim)
            blocks.append(block)
            widths.append(dim + self.growth_rate)
        self.blocks = nn.Sequential(*blocks)
        self.feature_info = [
            dict(module=f'blocks.{i}', num_chs=width, reduction=16) for i, width in enumerate(widths)]


default_cfgs = generate_default_cfgs(pretrained_cfgs('t2t_vit_dense', first_conv=FIRST_LAYERS['performer']))


@register_model
def t2t_vit_dense(pretrained: bool = False, **kwargs: Any) -> T2TViTDense:
    """T2T-ViT-Dense, performer tokens."""
    model_args = dict(growth_rate=64, block_config=(3, 6, 6, 4), embed_dim=128, num_heads=8, mlp_ratio=2.)
    return build_t2t_vit(T2TViTDense, 't2t_vit_dense', pretrained, **dict(model_args, **kwargs))
