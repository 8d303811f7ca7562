"""Token Performer: the T2T transformer with linear attention (paper section 3.1; Performer, arXiv 2009.14794)."""
import math
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F

from timm.layers import register_notrace_function

from .observe import is_plain
from .soft_split import split_norm_linear

__all__ = ['TokenPerformer']


class TokenPerformer(nn.Module):
    """Soft split followed by one Performer layer, the re-structurization of a tokens-to-token step.

    With u the unfolded patches, phi the positive random features (Performer, lemma 1) and m features,

        k, q, v = kqv(norm1(u)),    phi(x) = exp(w x - |x|^2 / 2) / sqrt(m)
        a = phi(q) (phi(k)' v) / (phi(q) phi(k)' 1 + 1e-8)
        y = v + proj(a),    out = y + mlp(norm2(y))

    The values are the skip connection, since the width changes.
    """
    eps: float = 1e-8

    def __init__(
            self,
            in_dim: int,
            dim: int = 64,
            kernel_size: int = 3,
            stride: int = 2,
            padding: int = 1,
            feature_ratio: float = 0.5,
            drop: float = 0.1,
            device=None,
            dtype=None,
    ) -> None:
        """Initialize the layer.

        Args:
            in_dim: Channels of the map that the soft split reads.
            dim: Width of the tokens.
            kernel_size: Side of a patch of the soft split, in pixels.
            stride: Distance of neighbouring patches, in pixels.
            padding: Zeros added on each side, in pixels.
            feature_ratio: Number of random features over dim.
            drop: Dropout rate after the projection and after the MLP.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.in_dim = in_dim
        self.dim = dim
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.num_features = int(dim * feature_ratio)
        patch_dim = in_dim * kernel_size ** 2

        self.register_buffer('w', torch.empty(self.num_features, dim, **dd))
        self.norm1 = nn.LayerNorm(patch_dim, eps=1e-5, **dd)
        self.kqv = nn.Linear(patch_dim, 3 * dim, **dd)
        self.dp = nn.Dropout(drop)
        self.proj = nn.Linear(dim, dim, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = nn.Sequential(
            nn.Linear(dim, dim, **dd),
            nn.GELU(),
            nn.Linear(dim, dim, **dd),
            nn.Dropout(drop),
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the random features: orthogonal rows times sqrt(m) (Performer, section 2.4)."""
        w = torch.empty_like(self.w, dtype=torch.float32)
        if not w.is_meta:
            nn.init.orthogonal_(w)
        self.w.copy_(w * math.sqrt(self.num_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_dim, H, W) to (B, dim, H', W')."""
        kqv = split_norm_linear(x, self.norm1, self.kqv, self.kernel_size, self.stride, self.padding)
        B, _, H, W = kqv.shape
        kqv = kqv.flatten(2).transpose(1, 2)
        if torch.jit.is_scripting() or is_plain(self.proj):
            a = performer_attention(kqv, self.w, self.eps, self.proj.weight, self.proj.bias)
        else:
            a = self.proj(performer_attention(kqv, self.w, self.eps))
        x = kqv[..., 2 * self.dim:] + self.dp(a)
        x = x + self.mlp(self.norm2(x))
        return x.transpose(1, 2).reshape(B, self.dim, H, W)


def _features(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.exp(F.linear(x, w) - 0.5 * x.square().sum(dim=-1, keepdim=True))


@torch.fx.wrap
@register_notrace_function
def performer_attention(
        kqv: torch.Tensor,
        w: torch.Tensor,
        eps: float,
        weight: Optional[torch.Tensor] = None,
        bias: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Linear attention through positive random features, followed by a linear map if one is given.

    With phi(x) = e(x) / sqrt(m), the 1 / m of every product cancels but for eps, which becomes m eps; and

        W (phi(q) (phi(k)'v))' = phi(q) (phi(k)'v W')'

    so the linear map acts on the m x dim product of each image instead of on its tokens.

    Args:
        kqv: Keys, queries and values, (B, N, 3 * dim).
        w: Random features, (m, dim).
        eps: Added to the denominator.
        weight: Weight of the linear map, (dim, dim), or None.
        bias: Its bias, (dim,).

    Returns:
        Tokens of shape (B, N, dim).
    """
    if not torch.jit.is_scripting() and not kqv.is_meta and torch.is_autocast_enabled(kqv.device.type):
        with torch.autocast(kqv.device.type, enabled=False):
            return _performer_attention(kqv, w, eps, weight, bias)
    return _performer_attention(kqv, w, eps, weight, bias)


def _performer_attention(
        kqv: torch.Tensor,
        w: torch.Tensor,
        eps: float,
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
) -> torch.Tensor:
    dtype = kqv.dtype
    if dtype == torch.float16 or dtype == torch.bfloat16:  # exp(w x - |x|^2 / 2) reaches e^16, past float16
        kqv, w = kqv.float(), w.float()
        if weight is not None and bias is not None:
            weight, bias = weight.float(), bias.float()
    k, q, v = kqv.split(w.shape[1], dim=-1)
    k, q = _features(k, w), _features(q, w)
    norm = torch.bmm(q, k.sum(dim=1).unsqueeze(-1)) + eps * w.shape[0]
    kv = torch.bmm(k.transpose(1, 2), v)
    if weight is not None:
        kv = F.linear(kv, weight)
    a = torch.bmm(q / norm, kv)
    return (a if bias is None else a + bias).to(dtype)
