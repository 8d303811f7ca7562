"""T2T-ViT: Tokens-to-Token ViT

Paper: `Tokens-to-Token ViT: Training Vision Transformers From Scratch on ImageNet`
    - https://arxiv.org/abs/2101.11986

The state dict is that of the published checkpoints (https://github.com/yitu-opensource/T2T-ViT, Clear BSD License).
"""
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from timm.layers import (
    AttentionPoolLatent,
    LayerType,
    PatchDropout,
    calculate_drop_path_rates,
    get_device_dtype,
    global_pool_nlc,
    resample_abs_pos_embed,
    to_2tuple,
    trunc_normal_,
)
from timm.models import checkpoint, generate_default_cfgs, named_apply
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size as record_input_size

from .. import ops
from ..layers import (
    Block,
    ClassTokenAttention,
    ConvTokens,
    GhostAttention,
    GhostMlp,
    Mlp,
    SqueezeExciteAttention,
    TokensToToken,
    sinusoidal_pos_embed,
    tokens_grid_size,
    tokens_to_token,
)
from ..weights.fit import resample_positions
from ..weights.names import pop_aux_head
from ._builder import build_t2t_vit, pretrained_cfgs
from ._patch_embed import PatchEmbedView
from ._registry import register_model

__all__ = ['T2TViT']

POOL_TYPES = ('token', 'avg', 'avgmax', 'max', 'map', '')
TOKEN_TYPES = ('performer', 'transformer', 'convolution')


class T2TViT(nn.Module):
    """Tokens-to-Token ViT: a tokens-to-token module, sinusoidal positions, a class token and a deep-narrow backbone.

    When the logits read the class token alone, the last block computes that row alone, unless a hook, a patched forward
    or fx looks at the last block or the final norm. `forward_features` and `forward_intermediates` give every token.
    """
    dynamic_img_size: torch.jit.Final[bool]

    if TYPE_CHECKING:  # what is registered or set from outside is Tensor | Module to nn.Module
        def __getattr__(self, name: str) -> Any: ...

    def __init__(
            self,
            img_size: int | tuple[int, int] = 224,
            in_chans: int = 3,
            num_classes: int = 1000,
            global_pool: str = 'token',
            token_type: str = 'performer',
            token_dim: int = 64,
            embed_dim: int = 384,
            depth: int = 14,
            num_heads: int = 6,
            mlp_ratio: float = 3.,
            qkv_bias: bool = False,
            class_token: bool = True,
            no_embed_class: bool = False,
            reg_tokens: int = 0,
            dynamic_img_size: bool = False,
            drop_rate: float = 0.,
            pos_drop_rate: float = 0.,
            patch_drop_rate: float = 0.,
            proj_drop_rate: float = 0.,
            attn_drop_rate: float = 0.,
            drop_path_rate: float = 0.,
            token_drop_rate: float = 0.1,
            norm_layer: type[nn.Module] | None = None,
            attn_layer: LayerType = ClassTokenAttention,
            mlp_layer: type[nn.Module] = Mlp,
            make_blocks: Callable[..., tuple[nn.Sequential, list[int]]] | None = None,
            device=None,
            dtype=None,
    ) -> None:
        """Initialize the model.

        Args:
            img_size: Input image size (H, W), in pixels.
            in_chans: Number of image input channels.
            num_classes: Number of classes for the classification head, 0 for none.
            global_pool: Pooling of the final tokens: 'token', 'avg', 'avgmax', 'max', 'map' (attention with a learned
                query), or '' for none.
            token_type: 'performer', 'transformer' or 'convolution' tokens (paper section 3.1; 4.3 for the last).
            token_dim: Width of the tokens inside the tokens-to-token module.
            embed_dim: Width of the backbone's tokens.
            depth: Number of blocks.
            num_heads: Number of attention heads.
            mlp_ratio: Ratio of the MLP's hidden width to embed_dim.
            qkv_bias: Add a bias to query, key and value; the published models have none.
            class_token: Use a class token.
            no_embed_class: Give positions to the tokens of the grid alone, not to class token and registers.
            reg_tokens: Number of register tokens.
            dynamic_img_size: Take images of any size, resampling the position table.
            drop_rate: Head dropout rate.
            pos_drop_rate: Dropout rate after the position table.
            patch_drop_rate: Share of the grid's tokens that training leaves out.
            proj_drop_rate: Dropout rate after the projections of attention and MLP.
            attn_drop_rate: Attention dropout rate.
            drop_path_rate: Stochastic depth rate of the last block.
            token_drop_rate: Dropout rate inside the token performers.
            norm_layer: Normalization layer of the backbone; by default LayerNorm with eps 1e-5.
            attn_layer: Attention layer of the blocks.
            mlp_layer: MLP layer of the blocks.
            make_blocks: Function of embed_dim, the drop path rate of each block and the other arguments of a block,
                which returns the blocks and the width of each one's tokens; by default plain blocks.

        Raises:
            ValueError: Unknown global_pool or token_type, global_pool 'token' without a class token, or an img_size
                below 3 x 3 pixels.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        make_norm: Any = norm_layer or partial(nn.LayerNorm, eps=1e-5)
        _check_choice('token_type', token_type, TOKEN_TYPES)
        self.has_class_token = class_token
        self._check_global_pool(global_pool)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.embed_dim = embed_dim
        self.num_reg_tokens = reg_tokens
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.no_embed_class = no_embed_class
        self.num_prefix_positions = 0 if no_embed_class else self.num_prefix_tokens
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        self._traits = {'first_conv': None}  # the checkpoint filter adapts the stem, timm need not
        self._set_img_size(img_size)

        if token_type == 'convolution':
            self.tokens_to_token: Any = ConvTokens(in_chans, embed_dim, token_dim, **dd)
        else:
            self.tokens_to_token = TokensToToken(token_type, in_chans, embed_dim, token_dim, token_drop_rate, **dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd)) if class_token else None
        self.reg_token = nn.Parameter(torch.empty(1, reg_tokens, embed_dim, **dd)) if reg_tokens else None
        num_positions = self.num_prefix_positions + self.grid_size[0] * self.grid_size[1]
        self.register_buffer('pos_embed', torch.empty(1, num_positions, embed_dim, **dd))
        self.pos_drop = nn.Dropout(p=pos_drop_rate)
        self.patch_drop = PatchDropout(patch_drop_rate, self.num_prefix_tokens) if patch_drop_rate else nn.Identity()
        self.norm_pre = nn.Identity()
        self.blocks, widths = (make_blocks or plain_blocks)(
            embed_dim,
            calculate_drop_path_rates(drop_path_rate, depth),
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            proj_drop=proj_drop_rate,
            attn_drop=attn_drop_rate,
            norm_layer=make_norm,
            attn_layer=attn_layer,
            mlp_layer=mlp_layer,
            **dd,
        )
        feature_info: list[dict[str, Any]] = [
            dict(module=f'blocks.{i}', num_chs=width, reduction=16) for i, width in enumerate(widths)]
        self.feature_info = feature_info
        self.num_features = self.head_hidden_size = self.feature_info[-1]['num_chs']
        self.norm = make_norm(self.num_features, **dd)
        self.attn_pool = None
        if global_pool == 'map':
            self.attn_pool = AttentionPoolLatent(
                self.num_features, num_heads=num_heads, mlp_ratio=mlp_ratio, norm_layer=make_norm, **dd)
        self.fc_norm = nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()

        if not self.pos_embed.is_meta:  # there drawing costs time and gives nothing
            self.init_weights(needs_reset=False)

    def _set_img_size(self, img_size: int | tuple[int, int]) -> None:
        size = tuple(to_2tuple(img_size))
        if len(size) != 2 or min(size) < 3:
            raise ValueError(f'img_size must be at least 3 x 3 pixels for the soft splits, not {size}.')
        self.img_size = (int(size[0]), int(size[1]))
        self.grid_size = tokens_grid_size(self.img_size)

    def init_weights(self, needs_reset: bool = True) -> None:
        """Initialize all weights and buffers.

        Args:
            needs_reset: Also call reset_parameters() of modules that have it; needed after `to_empty()`.
        """
        table = sinusoidal_pos_embed(1 + self.grid_size[0] * self.grid_size[1], self.embed_dim)
        with torch.no_grad():
            self.pos_embed.copy_(self.join_positions(table[:, :1], table[:, 1:]))
        for tokens in (self.cls_token, self.reg_token):
            if tokens is not None:
                trunc_normal_(tokens, std=.02)
        named_apply(partial(_init_weights, needs_reset=needs_reset), self)

    def join_positions(self, class_token: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        """Return the table of class token (1, 1, C), registers, whose rows are zeros, and grid (1, N, C)."""
        if self.no_embed_class:
            return grid
        registers = grid.new_zeros(1, self.num_reg_tokens, grid.shape[-1])
        return torch.cat([class_token[:, :int(self.has_class_token)], registers, grid], dim=1)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # any route may bring an official file: of token labeling, or of another image size
        pop_aux_head(state_dict, prefix)
        key = prefix + 'pos_embed'
        if key in state_dict and self.pos_embed is not None:
            state_dict[key] = resample_positions(state_dict[key], self)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Set of parameters that should not use weight decay."""
        return {'cls_token', 'reg_token'}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str | list]:
        """Create regex patterns for parameter grouping.

        Args:
            coarse: Use coarse grouping; the groups are the same.

        Returns:
            Dictionary mapping group names to regex patterns.
        """
        return dict(
            stem=r'^cls_token|reg_token|pos_embed|tokens_to_token',
            blocks=[(r'^blocks\.(\d+)', None), (r'^norm', (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing of the tokens-to-token steps and the blocks."""
        self.grad_checkpointing = enable
        self.tokens_to_token.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Get the classifier head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Reset the classifier head.

        Args:
            num_classes: Number of classes for the new classifier, 0 for none.
            global_pool: Pooling type, None to keep the current one. 'map' has weights, so it can be left but not taken.

        Raises:
            ValueError: Unknown global_pool, 'token' without a class token, or 'map' where the model has another.
        """
        dd = get_device_dtype(self)
        if global_pool is not None:
            self._check_global_pool(global_pool)
            if global_pool != 'map':
                self.attn_pool = None
            elif self.attn_pool is None:
                raise ValueError("global_pool='map' has weights of its own: create the model with it.")
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head.train(self.training)

    def _check_global_pool(self, global_pool: str) -> None:
        _check_choice('global_pool', global_pool, POOL_TYPES)
        if global_pool == 'token' and not self.has_class_token:
            raise ValueError("global_pool='token' needs the class token: use another, or class_token=True.")

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the input image size, resampling the position table bicubically.

        Args:
            img_size: New size (H, W), in pixels.

        Raises:
            ValueError: A size below 3 x 3 pixels.
        """
        prev_grid_size = self.grid_size
        self._set_img_size(img_size)
        if self.grid_size != prev_grid_size:
            self.pos_embed = self._resampled_pos_embed(self.grid_size, prev_grid_size)
        record_input_size(self, self.img_size)

    def _resampled_pos_embed(self, grid_size: tuple[int, int], old_grid_size: tuple[int, int]) -> torch.Tensor:
        return resample_abs_pos_embed(
            self.pos_embed,
            new_size=list(grid_size),
            old_size=list(old_grid_size),
            num_prefix_tokens=self.num_prefix_positions,
        )

    @property
    @torch.jit.unused
    def patch_embed(self) -> PatchEmbedView:
        """The tokens-to-token module as timm's PatchEmbed: made at each access, it changes no state dict."""
        return PatchEmbedView(self)

    def _embed(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Map images to the tokens (B, P + N, C) that the blocks read, P prefix tokens first, and their grid."""
        x = self.tokens_to_token(self.check_image(x))
        grid_size = (x.shape[2], x.shape[3])
        return self.norm_pre(self.patch_drop(self.add_positions(x))), grid_size

    def check_image(self, x: torch.Tensor) -> torch.Tensor:
        """Return images (B, in_chans, H, W) as they are, or raise a ValueError that says what is wrong with them."""
        # through the module that defines it, where fx finds it wrapped
        return tokens_to_token.check_image(x, self.in_chans, None if self.dynamic_img_size else self.img_size)

    def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
        # what timm's ViT does with the result of patch_embed, by timm's name
        x = x.permute(0, 3, 1, 2) if self.dynamic_img_size else x.transpose(1, 2).unflatten(2, self.grid_size)
        return self.add_positions(x)

    def add_positions(self, x: torch.Tensor) -> torch.Tensor:
        """Map the grid of tokens (B, C, H', W') to prefix tokens and tokens with positions, (B, P + N, C)."""
        pos_embed = self.pos_embed
        if self.dynamic_img_size:
            pos_embed = self._resampled_pos_embed((x.shape[2], x.shape[3]), self.grid_size)
        x = x.flatten(2).transpose(1, 2)
        if self.no_embed_class:
            x = x + pos_embed
        tokens = [x]
        if self.reg_token is not None:
            tokens.insert(0, self.reg_token.expand(x.shape[0], -1, -1))
        if self.cls_token is not None:
            tokens.insert(0, self.cls_token.expand(x.shape[0], -1, -1))
        x = torch.cat(tokens, dim=1)
        if not self.no_embed_class:
            x = x + pos_embed
        return self.pos_drop(x)

    def forward_blocks(
            self,
            x: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
            class_token: bool = False,
    ) -> torch.Tensor:
        """Map tokens (B, P + N, C) through the blocks; if class_token, what returns may be the class token alone."""
        if torch.jit.is_scripting() or attn_mask is not None or is_causal:
            for blk in self.blocks:
                x = blk(x, attn_mask=attn_mask, is_causal=is_causal)
            return x
        return self._forward_blocks(x, class_token)

    @torch.jit.unused
    def _forward_blocks(self, x: torch.Tensor, class_token: bool) -> torch.Tensor:
        blocks: list[Any] = list(self.blocks)
        last: Any = blocks[-1] if blocks else None
        class_token = class_token and isinstance(last, Block) and ops.is_unobserved(x, last, self.norm)
        for blk in blocks[:-1] if class_token else blocks:
            x = checkpoint(blk, x) if self.grad_checkpointing else blk(x)
        return last.class_token(x) if class_token else x

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
            output_dict: bool = False,
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]] | dict[str, Any]:
        """Forward features that returns intermediates.

        Args:
            x: Images of shape (B, in_chans, H, W).
            indices: Take last n blocks if int, all if None, select matching indices if sequence.
            return_prefix_tokens: Return both prefix and spatial intermediate tokens.
            norm: Apply the final norm to all intermediates that are as wide.
            stop_early: Stop iterating over blocks when the last desired intermediate is hit.
            output_fmt: Shape of the intermediates, 'NCHW' or 'NLC'; tokens that are dropped leave no map.
            intermediates_only: Only return the intermediates.
            output_dict: Return a dictionary with 'image_features', 'image_intermediates' and, if asked for,
                'image_intermediates_prefix'.
            attn_mask: Optional mask for the attention of the blocks.
            is_causal: Use causal attention in the blocks.

        Returns:
            (final tokens, intermediates), the intermediates alone, or a dictionary.

        Raises:
            ValueError: 'NCHW' in training with a patch_drop_rate.
        """
        assert output_fmt in ('NCHW', 'NLC'), 'Output format must be one of NCHW or NLC.'
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        intermediates: list[Any] = []

        x, (H, W) = self._embed(x)
        if output_fmt == 'NCHW' and x.shape[1] != self.num_prefix_tokens + H * W:
            raise ValueError("patch_drop_rate leaves no whole map in training: use output_fmt='NLC' or evaluate.")
        for i, blk in enumerate(self.blocks[:max_index + 1] if stop_early else self.blocks):
            if attn_mask is not None or is_causal:
                x = blk(x, attn_mask=attn_mask, is_causal=is_causal)
            elif self.grad_checkpointing:
                x = checkpoint(blk, x)
            else:
                x = blk(x)
            if i in take_indices:
                intermediates.append(self._norm(x) if norm else x)

        prefix_tokens = [y[:, :self.num_prefix_tokens] for y in intermediates]
        intermediates = [y[:, self.num_prefix_tokens:] for y in intermediates]
        if output_fmt == 'NCHW':
            intermediates = [y.transpose(1, 2).reshape(y.shape[0], -1, H, W).contiguous() for y in intermediates]

        if output_dict:
            result: dict[str, Any] = {'image_intermediates': intermediates}
            if return_prefix_tokens and self.num_prefix_tokens:
                result['image_intermediates_prefix'] = prefix_tokens
            if not intermediates_only:
                result['image_features'] = self._norm(x)
            return result

        if return_prefix_tokens and self.num_prefix_tokens:
            intermediates = list(zip(intermediates, prefix_tokens, strict=True))
        if intermediates_only:
            return intermediates
        return self._norm(x), intermediates

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        # the tokens of earlier blocks may be of another width (T2T-ViT-Dense), which the final norm does not know
        return self.norm(x) if x.shape[-1] == self.num_features else x

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Prune layers not required for the specified intermediates.

        Args:
            indices: Indices of the intermediates to keep, or the last n if int.
            prune_norm: Whether to prune the final norm.
            prune_head: Whether to prune the classifier head.

        Returns:
            List of indices that were kept.
        """
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[:max_index + 1]  # truncate blocks
        if prune_norm or self.feature_info[max_index]['num_chs'] != self.num_features:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def get_intermediate_layers(
            self,
            x: torch.Tensor,
            n: int | list[int] | tuple[int] = 1,
            reshape: bool = False,
            return_prefix_tokens: bool = False,
            norm: bool = False,
            attn_mask: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Get intermediate layer outputs (DINO interface compatibility).

        Args:
            x: Images of shape (B, in_chans, H, W).
            n: Number or indices of blocks.
            reshape: Reshape to NCHW.
            return_prefix_tokens: Return prefix tokens too.
            norm: Apply the final norm.
            attn_mask: Optional mask for the attention of the blocks.

        Returns:
            List of intermediates.
        """
        levels: Any = self.forward_intermediates(
            x, n,  # type: ignore[arg-type]  # the signatures are timm's, and it takes a tuple
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt='NCHW' if reshape else 'NLC',
            intermediates_only=True,
            attn_mask=attn_mask,
        )
        return levels

    def forward_features(
            self,
            x: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to normalized tokens (B, P + N, C), class token and registers first."""
        x, _ = self._embed(x)
        return self.norm(self.forward_blocks(x, attn_mask, is_causal))

    def pool(self, x: torch.Tensor, pool_type: str | None = None) -> torch.Tensor:
        """Pool tokens (B, P + N, C) to (B, C), or leave them for pool_type ''; 'map' is not replaced by pool_type."""
        if self.attn_pool is not None:
            return self.attn_pool(x[:, self.num_prefix_tokens:])
        pool_type = self.global_pool if pool_type is None else pool_type
        return global_pool_nlc(x, pool_type=pool_type, num_prefix_tokens=self.num_prefix_tokens)

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map tokens (B, P + N, C) to logits (B, num_classes), or to what the classifier reads if pre_logits."""
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        x, _ = self._embed(x)
        x = self.norm(self.forward_blocks(x, attn_mask, is_causal, class_token=self.global_pool == 'token'))
        return self.forward_head(x)


def plain_blocks(
        dim: int,
        drop_path_rates: Sequence[Any],
        **kwargs: Any,
) -> tuple[nn.Sequential, list[int]]:
    """Return a block for each drop path rate, and the widths of their tokens; further arguments as Block has them."""
    blocks = [Block(dim, drop_path=rate, **kwargs) for rate in drop_path_rates]
    return nn.Sequential(*blocks), [dim] * len(blocks)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"Unknown {name} {value!r}: use one of {', '.join(map(repr, choices))}.")


def _init_weights(module: nn.Module, name: str = '', needs_reset: bool = True) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, AttentionPoolLatent):
        module.init_weights()
    elif needs_reset and hasattr(module, 'reset_parameters'):
        module.reset_parameters()  # type: ignore[operator]  # hasattr tells nothing of an attribute of nn.Module


default_cfgs = generate_default_cfgs(pretrained_cfgs(
    't2t_vit_7', 't2t_vit_10', 't2t_vit_12', 't2t_vit_14', 't2t_vit_19', 't2t_vit_24', 't2t_vit_14_384',
    't2t_vit_t_14', 't2t_vit_t_19', 't2t_vit_t_24', 't2t_vit_c_14', 't2t_vit_14_resnext', 't2t_vit_14_wide',
    't2t_vit_14_se', 't2t_vit_16_ghost', 'test_t2t_vit',
))


def _create_t2t_vit(variant: str, pretrained: bool = False, **kwargs: Any) -> T2TViT:
    return build_t2t_vit(T2TViT, variant, pretrained, **kwargs)


@register_model
def t2t_vit_7(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-7, performer tokens."""
    model_args = dict(embed_dim=256, depth=7, num_heads=4, mlp_ratio=2.)
    return _create_t2t_vit('t2t_vit_7', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_10(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-10, performer tokens."""
    model_args = dict(embed_dim=256, depth=10, num_heads=4, mlp_ratio=2.)
    return _create_t2t_vit('t2t_vit_10', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_12(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-12, performer tokens."""
    model_args = dict(embed_dim=256, depth=12, num_heads=4, mlp_ratio=2.)
    return _create_t2t_vit('t2t_vit_12', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-14, performer tokens."""
    model_args = dict(embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.)
    return _create_t2t_vit('t2t_vit_14', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_19(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-19, performer tokens."""
    model_args = dict(embed_dim=448, depth=19, num_heads=7, mlp_ratio=3.)
    return _create_t2t_vit('t2t_vit_19', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_24(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-24, performer tokens."""
    model_args = dict(embed_dim=512, depth=24, num_heads=8, mlp_ratio=3.)
    return _create_t2t_vit('t2t_vit_24', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_14_384(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-14 for 384 x 384 pixels, performer tokens."""
    model_args = dict(img_size=384, embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.)
    return _create_t2t_vit('t2t_vit_14_384', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_t_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT_t-14, transformer tokens."""
    model_args = dict(token_type='transformer', embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.)
    return _create_t2t_vit('t2t_vit_t_14', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_t_19(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT_t-19, transformer tokens."""
    model_args = dict(token_type='transformer', embed_dim=448, depth=19, num_heads=7, mlp_ratio=3.)
    return _create_t2t_vit('t2t_vit_t_19', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_t_24(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT_t-24, transformer tokens."""
    model_args = dict(token_type='transformer', embed_dim=512, depth=24, num_heads=8, mlp_ratio=3.)
    return _create_t2t_vit('t2t_vit_t_24', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_c_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT_c-14, the soft splits as plain convolutions."""
    model_args = dict(token_type='convolution', embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.)
    return _create_t2t_vit('t2t_vit_c_14', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_14_resnext(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-14 with 32 heads, the ResNeXt study."""
    model_args = dict(embed_dim=384, depth=14, num_heads=32, mlp_ratio=3.)
    return _create_t2t_vit('t2t_vit_14_resnext', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_14_wide(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT shallow and wide, the Wide-ResNet study."""
    model_args = dict(embed_dim=768, depth=4, num_heads=12, mlp_ratio=3.)
    return _create_t2t_vit('t2t_vit_14_wide', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_14_se(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-14 with squeeze-excitation after the attention."""
    model_args = dict(embed_dim=384, depth=14, num_heads=6, mlp_ratio=3., attn_layer=SqueezeExciteAttention)
    return _create_t2t_vit('t2t_vit_14_se', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def t2t_vit_16_ghost(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-16 with ghost features in attention and MLP."""
    model_args = dict(
        embed_dim=384, depth=16, num_heads=6, mlp_ratio=3., attn_layer=GhostAttention, mlp_layer=GhostMlp)
    return _create_t2t_vit('t2t_vit_16_ghost', pretrained=pretrained, **dict(model_args, **kwargs))


@register_model
def test_t2t_vit(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """A small T2T-ViT for tests; its weights read handwritten digits and ship inside the package."""
    model_args = dict(img_size=56, embed_dim=64, depth=4, num_heads=4, mlp_ratio=2.)
    return _create_t2t_vit('test_t2t_vit', pretrained=pretrained, **dict(model_args, **kwargs))
