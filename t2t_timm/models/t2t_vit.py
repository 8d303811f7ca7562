"""T2T-ViT: Tokens-to-Token ViT

Paper: `Tokens-to-Token ViT: Training Vision Transformers From Scratch on ImageNet`
    - https://arxiv.org/abs/2101.11986

timm's VisionTransformer with another patch embedding. Published checkpoints
(https://github.com/yitu-opensource/T2T-ViT, Clear BSD License) load under their own names by every route.
"""
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Attention, DropPath, LayerNorm, LayerScale, LayerType, Mlp, trunc_normal_
from timm.models import checkpoint, generate_default_cfgs
from timm.models.vision_transformer import Block, VisionTransformer

from .. import ops
from ..layers import (
    ConvTokens,
    GhostAttention,
    GhostMlp,
    SqueezeExciteAttention,
    TokensToToken,
    join_positions,
    sinusoidal_pos_embed,
)
from ..weights.fit import FIRST_LAYERS, fit_state_dict
from ._builder import build_t2t_vit, pretrained_cfgs
from ._registry import register_model

__all__ = ['T2TViT']


def make_embed_layer(
        token_type: str = 'performer',
        token_dim: int = 64,
        token_drop_rate: float = 0.1,
) -> Callable[..., nn.Module]:
    """Return the embed_layer of a token type; arguments as T2TViT has them."""
    if token_type not in FIRST_LAYERS:
        raise ValueError(f'Unknown token_type {token_type!r}: use one of {", ".join(map(repr, FIRST_LAYERS))}.')
    if token_type == 'convolution':
        return partial(ConvTokens, token_dim=token_dim)
    return partial(TokensToToken, token_type=token_type, token_dim=token_dim, token_drop_rate=token_drop_rate)


class T2TViT(VisionTransformer):
    """Tokens-to-Token ViT: timm's ViT with a tokens-to-token module, sinusoidal positions and a deep-narrow backbone.

    When the logits read the class token alone, the last block computes that row alone, unless something in it was
    changed or is looked at (`ops.can_fuse`). `forward_features` and `forward_intermediates` give every token.
    """

    if TYPE_CHECKING:  # To nn.Module, what is registered or set from outside is Tensor | Module.
        pos_embed: Any
        weight_init_mode: Any
        def __getattr__(self, name: str) -> Any: ...

    def __init__(
            self,
            token_type: str = 'performer',
            token_dim: int = 64,
            token_drop_rate: float = 0.1,
            embed_dim: int = 384,
            depth: int = 14,
            num_heads: int = 6,
            mlp_ratio: float = 3.,
            qkv_bias: bool = False,
            pos_embed: str = 'sinusoidal',
            fc_norm: bool | None = False,
            embed_layer: Callable[..., nn.Module] | None = None,
            norm_layer: LayerType | None = None,
            **kwargs: Any,
    ) -> None:
        """Initialize the model.

        Args:
            token_type: 'performer', 'transformer' or 'convolution' tokens (paper section 3.1; 4.3 for the last).
            token_dim: Width of the tokens inside the tokens-to-token module.
            token_drop_rate: Dropout rate inside the token performers.
            embed_dim: Width of the backbone's tokens.
            depth: Number of blocks.
            num_heads: Number of attention heads.
            mlp_ratio: Ratio of the MLP's hidden width to embed_dim.
            qkv_bias: Add a bias to query, key and value; the published models have none.
            pos_embed: 'sinusoidal' for the published table, a buffer; 'learn' or 'none' as in timm.
            fc_norm: Move the final norm behind the pooling; None decides as timm does.
            embed_layer: Patch embedding; by default the tokens-to-token module that token_type names.
            norm_layer: Normalization layer of the backbone; by default LayerNorm with eps 1e-5.
            **kwargs: Further arguments of timm's VisionTransformer.

        Raises:
            ValueError: Unknown token_type, a patch_size other than 16, or an img_size below 3 x 3 pixels.
        """
        self.has_sinusoidal_pos_embed = pos_embed == 'sinusoidal'  # register_parameter reads it
        super().__init__(
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            pos_embed='learn' if pos_embed == 'sinusoidal' else pos_embed,
            fc_norm=fc_norm,
            embed_layer=embed_layer or make_embed_layer(token_type, token_dim, token_drop_rate),
            norm_layer=norm_layer or partial(LayerNorm, eps=1e-5),
            **kwargs,
        )
        self._traits = {'first_conv': None}  # the checkpoint filter adapts the first layer, not timm

    def init_weights(self, mode: str = '', needs_reset: bool = True) -> None:
        """Initialize all weights and buffers.

        Args:
            mode: Initialization of the linear maps, as in timm.
            needs_reset: Also call reset_parameters() of modules that have it; needed after `to_empty()`.
        """
        if next(self.parameters()).is_meta:  # Skip initialization on the meta device.
            return
        super().init_weights(mode, needs_reset)
        for tokens in (self.cls_token, self.reg_token):
            if tokens is not None:
                trunc_normal_(tokens, std=.02)
        if self.has_sinusoidal_pos_embed:
            table = sinusoidal_pos_embed(1 + self.patch_embed.num_patches, self.pos_embed.shape[-1])
            table = join_positions(table, self.has_class_token, self.num_reg_tokens, self.no_embed_class)
            with torch.no_grad():
                self.pos_embed.copy_(table)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter; a sinusoidal table as a buffer, whoever assigns it (set_input_size, Transformers)."""
        if name == 'pos_embed' and self.__dict__.get('has_sinusoidal_pos_embed'):
            self.register_buffer(name, None if param is None else param.detach())
        else:
            super().register_parameter(name, param)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that should have no weight decay."""
        # A scripted model calls this too, and is no T2TViT: it has no super().
        return VisionTransformer.no_weight_decay(self) - {name for name, _ in self.named_buffers(recurse=False)}

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        fit_state_dict(state_dict, self, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        if not torch.jit.is_scripting():
            if attn_mask is None and not is_causal and self._reads_class_token(x):
                return self.forward_head(self._class_token_features(x))
        x = self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal)
        return self.forward_head(x)

    @torch.jit.unused
    def _reads_class_token(self, x: torch.Tensor) -> bool:
        """Return whether the logits read the class token alone, and nothing looks at the others in the last block."""
        if self.global_pool != 'token' or self.attn_pool is not None:
            return False
        # A wrapper of the blocks need not have a last one.
        if not isinstance(self.blocks, nn.Sequential) or len(self.blocks) == 0:
            return False
        return ops.can_fuse(x, self, self.blocks[-1])

    @torch.jit.unused
    def _class_token_features(self, x: torch.Tensor) -> torch.Tensor:
        """Return `forward_features(x)[:, :1]`: the last block computes one query."""
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        blocks: list[Any] = list(self.blocks)
        for block in blocks[:-1]:
            x = checkpoint(block, x) if self.grad_checkpointing else block(x)
        last, attn = blocks[-1], blocks[-1].attn
        B, N, _ = x.shape
        y = last.norm1(x)
        if _needs_no_keys(attn, y):
            y = ops.class_token_attention(y, attn.qkv, attn.num_heads, attn.scale)
        else:  # the steps of timm's attention, for one query
            qkv = attn.qkv(y).reshape(B, N, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
            q, k, v = qkv.unbind(0)
            q, k = attn.q_norm(q)[:, :, :1], attn.k_norm(k)
            if attn.fused_attn:
                y = F.scaled_dot_product_attention(q, k, v, dropout_p=attn.attn_drop.p if attn.training else 0.)
            else:
                y = attn.attn_drop((q * attn.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
            y = y.transpose(1, 2).flatten(2)
        y = attn.proj_drop(attn.proj(attn.norm(y)))
        x = x[:, :1] + last.drop_path1(last.ls1(y))
        x = x + last.drop_path2(last.ls2(last.mlp(last.norm2(x))))
        return self.norm(x)


def _needs_no_keys(attn: Any, x: torch.Tensor) -> bool:
    """Return whether the class token's attention may skip the linear map to keys and values, and gains by it."""
    return (
        x.device.type == 'cpu'  # a GPU would launch more, and cast weights under autocast
        and not (attn.attn_drop.training and attn.attn_drop.p > 0.)
        and type(attn.q_norm) is type(attn.k_norm) is nn.Identity
        and type(attn.qkv) is nn.Linear
        and ops.can_fuse(x, attn, attn.qkv, attn.q_norm, attn.k_norm)
    )


def _pointwise(*children: str) -> dict[str, Any]:
    """Return the classes allowed for children that the class token's row skips, or that it gives one token of all."""
    classes = nn.Linear, nn.LayerNorm, nn.Identity, nn.Dropout, nn.GELU, LayerNorm, DropPath, LayerScale, Mlp
    return dict.fromkeys(children, classes)


ops.register(
    T2TViT, 'forward_features', 'forward_head', 'pool', blocks=(nn.Sequential,), **_pointwise('norm'))
ops.register(
    Block, attn=(Attention,), **_pointwise('ls1', 'drop_path1', 'norm2', 'mlp', 'ls2', 'drop_path2'))
ops.register(
    Attention, check=lambda m: getattr(m, 'gate', None) is None,
    **_pointwise('attn_drop', 'norm', 'proj', 'proj_drop'))
ops.register(Mlp, **_pointwise('fc1', 'act', 'drop1', 'norm', 'fc2', 'drop2'))
ops.register(LayerNorm, check=lambda m: len(m.normalized_shape) == 1)
ops.register(DropPath)
ops.register(LayerScale)


default_cfgs = generate_default_cfgs({
    **pretrained_cfgs(
        't2t_vit_7', 't2t_vit_10', 't2t_vit_12', 't2t_vit_14', 't2t_vit_19', 't2t_vit_24', 't2t_vit_14_384',
        't2t_vit_14_resnext', 't2t_vit_14_wide', 't2t_vit_14_se', 't2t_vit_16_ghost', 'test_t2t_vit',
        first_conv=FIRST_LAYERS['performer'],
    ),
    **pretrained_cfgs('t2t_vit_t_14', 't2t_vit_t_19', 't2t_vit_t_24', first_conv=FIRST_LAYERS['transformer']),
    **pretrained_cfgs('t2t_vit_c_14', first_conv=FIRST_LAYERS['convolution']),
})


@register_model
def t2t_vit_7(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-7, performer tokens."""
    model_args = dict(embed_dim=256, depth=7, num_heads=4, mlp_ratio=2.)
    return build_t2t_vit(T2TViT, 't2t_vit_7', pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_10(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-10, performer tokens."""
    model_args = dict(embed_dim=256, depth=10, num_heads=4, mlp_ratio=2.)
    return build_t2t_vit(T2TViT, 't2t_vit_10', pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_12(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-12, performer tokens."""
    model_args = dict(embed_dim=256, depth=12, num_heads=4, mlp_ratio=2.)
    return build_t2t_vit(T2TViT, 't2t_vit_12', pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-14, performer tokens."""
    model_args = dict(embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.)
    return build_t2t_vit(T2TViT, 't2t_vit_14', pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_19(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-19, performer tokens."""
    model_args = dict(embed_dim=448, depth=19, num_heads=7, mlp_ratio=3.)
    return build_t2t_vit(T2TViT, 't2t_vit_19', pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_24(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-24, performer tokens."""
    model_args = dict(embed_dim=512, depth=24, num_heads=8, mlp_ratio=3.)
    return build_t2t_vit(T2TViT, 't2t_vit_24', pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_14_384(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-14 for 384 x 384 pixels, performer tokens."""
    model_args = dict(img_size=384, embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.)
    return build_t2t_vit(T2TViT, 't2t_vit_14_384', pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_t_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT_t-14, transformer tokens."""
    model_args = dict(token_type='transformer', embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.)
    return build_t2t_vit(T2TViT, 't2t_vit_t_14', pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_t_19(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT_t-19, transformer tokens."""
    model_args = dict(token_type='transformer', embed_dim=448, depth=19, num_heads=7, mlp_ratio=3.)
    return build_t2t_vit(T2TViT, 't2t_vit_t_19', pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_t_24(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT_t-24, transformer tokens."""
    model_args = dict(token_type='transformer', embed_dim=512, depth=24, num_heads=8, mlp_ratio=3.)
    return build_t2t_vit(T2TViT, 't2t_vit_t_24', pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_c_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT_c-14, the soft splits as plain convolutions."""
    model_args = dict(token_type='convolution', embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.)
    return build_t2t_vit(T2TViT, 't2t_vit_c_14', pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_14_resnext(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-14 with 32 heads, the ResNeXt study."""
    model_args = dict(embed_dim=384, depth=14, num_heads=32, mlp_ratio=3.)
    return build_t2t_vit(T2TViT, 't2t_vit_14_resnext', pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_14_wide(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT shallow and wide, the Wide-ResNet study."""
    model_args = dict(embed_dim=768, depth=4, num_heads=12, mlp_ratio=3.)
    return build_t2t_vit(T2TViT, 't2t_vit_14_wide', pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_14_se(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-14 with squeeze-excitation after the attention."""
    model_args = dict(embed_dim=384, depth=14, num_heads=6, mlp_ratio=3., attn_layer=SqueezeExciteAttention)
    return build_t2t_vit(T2TViT, 't2t_vit_14_se', pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_16_ghost(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-16 with ghost features in attention and MLP."""
    model_args = dict(
        embed_dim=384, depth=16, num_heads=6, mlp_ratio=3., attn_layer=GhostAttention, mlp_layer=GhostMlp)
    return build_t2t_vit(T2TViT, 't2t_vit_16_ghost', pretrained, **dict(model_args, **kwargs))


@register_model
def test_t2t_vit(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """A small T2T-ViT for tests; its weights read handwritten digits and ship inside the package."""
    model_args = dict(img_size=56, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2.)
    return build_t2t_vit(T2TViT, 'test_t2t_vit', pretrained, **dict(model_args, **kwargs))
