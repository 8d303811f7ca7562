"""Attention and MLP of the paper's study variants: squeeze-excitation and ghost features (section 4.3)."""
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Attention, maybe_add_mask, resolve_self_attn_mask


def _refuse(layer: nn.Module, **options: bool | None) -> None:
    for name, value in options.items():
        if value:
            raise ValueError(f"{type(layer).__name__} has no {name}: use timm's attention and MLP with it.")


class SqueezeExciteAttention(Attention):
    """Attention whose projected output is gated by squeeze-excitation over all tokens (paper section 4.3, SE)."""

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False, **kwargs: Any) -> None:
        """Initialize the layer; arguments as timm's Attention has them.

        Raises:
            ValueError: qk_norm, scale_norm or gated, which this layer does not have.
        """
        _refuse(
            self, qk_norm=kwargs.get('qk_norm'), scale_attn_norm=kwargs.get('scale_norm'), gated=kwargs.get('gated'))
        super().__init__(dim, num_heads, qkv_bias=qkv_bias, **kwargs)
        self.se_layer = SqueezeExcite(dim, device=kwargs.get('device'), dtype=kwargs.get('dtype'))

    def forward(
            self,
            x: torch.Tensor,
            attn_mask: torch.Tensor | None = None,
            is_causal: bool = False,
    ) -> torch.Tensor:
        """Map tokens (B, N, dim) to (B, N, dim), as timm's Attention, which has no place for the gate."""
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused_attn:
            dropout_p = self.attn_drop.p if self.training else 0.
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            attn = maybe_add_mask(attn, resolve_self_attn_mask(N, attn, attn_mask, is_causal))
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        return self.proj_drop(self.se_layer(self.proj(x.transpose(1, 2).flatten(2))))


class SqueezeExcite(nn.Module):
    """Gate of each channel from the mean over all tokens, class token included; no biases."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        """Initialize the gate of `dim` channels, with a bottleneck 16 times narrower."""
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(dim, dim // 16, bias=False, **dd),
            nn.ReLU(inplace=True),
            nn.Linear(dim // 16, dim, bias=False, **dd),
            nn.Sigmoid(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Gate tokens (B, N, C)."""
        return x * self.fc(x.mean(dim=1)).unsqueeze(1)


class _ChannelScale(nn.Conv1d):
    """A learned scale per channel of tokens (B, N, C); the published code keeps it as a depthwise convolution.

    A subclass, since the product is 50 times as fast as the convolution is on a CPU.
    """

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        super().__init__(dim, dim, kernel_size=1, groups=dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight.view(-1)


class GhostAttention(Attention):
    """Attention on ghost features: q, k and v are half projected, half a scaled copy of that (paper section 4.3)."""

    def __init__(self, dim: int, num_heads: int = 8, qkv_bias: bool = False, **kwargs: Any) -> None:
        """Initialize the layer; arguments as timm's Attention has them.

        Raises:
            ValueError: qk_norm or scale_norm, which this layer does not have.
        """
        dd: dict[str, Any] = {'device': kwargs.get('device'), 'dtype': kwargs.get('dtype')}
        _refuse(self, qk_norm=kwargs.get('qk_norm'), scale_attn_norm=kwargs.get('scale_norm'))
        super().__init__(dim, num_heads, **kwargs)
        del self.qkv  # what timm's forward calls is the method below
        self.q, self.k, self.v = (nn.Linear(dim, dim // 2, bias=qkv_bias, **dd) for _ in range(3))
        self.cheap_operation_q, self.cheap_operation_k, self.cheap_operation_v = (
            _ChannelScale(dim // 2, **dd) for _ in range(3))

    def qkv(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Map tokens (B, N, dim) to queries, keys and values, (B, N, 3 * dim)."""
        q, k, v = self.q(x), self.k(x), self.v(x)
        return torch.cat(
            [q, self.cheap_operation_q(q), k, self.cheap_operation_k(k), v, self.cheap_operation_v(v)], dim=-1)


class GhostMlp(nn.Module):
    """MLP on ghost features: fc1 keeps the width, two scaled copies of its activation are appended (section 4.3)."""

    def __init__(
            self,
            in_features: int,
            hidden_features: int,
            act_layer: type[nn.Module] = nn.GELU,
            norm_layer: type[nn.Module] | None = None,
            bias: bool = True,
            drop: float = 0.,
            device=None,
            dtype=None,
    ) -> None:
        """Initialize the layer; arguments as timm's Mlp has them, hidden_features being 3 * in_features.

        Raises:
            ValueError: hidden_features is not 3 * in_features, or a norm_layer, which this layer does not have.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        _refuse(self, scale_mlp_norm=norm_layer is not None)
        if hidden_features != 3 * in_features:
            raise ValueError(
                f'GhostMlp makes three times as many features as it reads: hidden_features must be {3 * in_features} '
                f'(mlp_ratio=3), not {hidden_features}.'
            )
        self.fc1 = nn.Linear(in_features, in_features, bias=bias, **dd)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features, bias=bias, **dd)
        self.drop = nn.Dropout(drop)
        self.cheap_operation2 = _ChannelScale(in_features, **dd)
        self.cheap_operation3 = _ChannelScale(in_features, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, N, C) to (B, N, C)."""
        x = self.act(self.fc1(x))
        x2 = self.act(self.cheap_operation2(x))
        x3 = self.act(self.cheap_operation3(x))
        x = self.drop(torch.cat([x, x2, x3], dim=-1))
        return self.drop(self.fc2(x))
