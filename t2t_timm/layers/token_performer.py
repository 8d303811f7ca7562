"""Token Performer: the T2T transformer with linear attention (paper section 3.1; Performer, arXiv 2009.14794)."""
import math
from typing import Any

import torch
import torch.nn as nn

from .. import ops
from .soft_split import fold_modules, soft_split, soft_split_size, tokens_to_map

__all__ = ['TokenPerformer', 'performer_attention']


class TokenPerformer(nn.Module):
    """Soft split followed by one Performer layer, the re-structurization of a tokens-to-token step.

    With u the unfolded patches, phi the positive random features (Performer, lemma 1) and m of them,

        k, q, v = kqv(norm1(u)),    phi(x) = exp(w x - |x|^2 / 2) / sqrt(m)
        a = phi(q) (phi(k)' v) / (phi(q) phi(k)' 1 + 1e-8)
        y = v + proj(a),    out = y + mlp(norm2(y))

    The values are the skip connection, since the width changes.
    """

    w: torch.Tensor

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
        self.dim = dim
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.num_features = int(dim * feature_ratio)
        self.eps = 1e-8
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
        """Draw the random features: orthogonal rows times sqrt(m) (Performer, section 2.4).

        On the CPU, so that a seed gives the same on every device.
        """
        if not self.w.is_meta:
            w = nn.init.orthogonal_(torch.empty(self.w.shape, dtype=torch.float32, device='cpu'))
            self.w.copy_(w * math.sqrt(self.num_features))

    def reparameterize(self) -> None:
        """Store the weights that the norm is folded into, for inference; `timm.utils.reparameterize_model` calls it."""
        self.norm1, self.kqv = fold_modules(self.norm1, self.kqv)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_dim, H, W) to (B, dim, H', W')."""
        split = self.kernel_size, self.stride, self.padding
        height, width = soft_split_size(x.shape[2], *split), soft_split_size(x.shape[3], *split)

        out = self._layer(self._kqv(x)) if torch.jit.is_scripting() else self._fused_layer(x)
        return tokens_to_map(out, height, width)

    def _kqv(self, x: torch.Tensor) -> torch.Tensor:
        """Return k, q, v, (B, N, 3 * dim)."""
        return self.kqv(self.norm1(soft_split(x, self.kernel_size, self.stride, self.padding)))

    def _layer(self, kqv: torch.Tensor) -> torch.Tensor:
        """Return out, (B, N, dim)."""
        a = performer_attention(kqv, self.w, self.eps)
        y = kqv[..., 2 * self.dim:] + self.dp(self.proj(a))
        return y + self.mlp(self.norm2(y))

    @torch.jit.unused
    def _fused_layer(self, x: torch.Tensor) -> torch.Tensor:
        """Return out, by fused operations where they may stand for the modules."""
        if ops.is_plain(x, self.norm1, self.kqv):
            kqv = ops.soft_split_norm_linear(
                x, self.norm1.weight, self.norm1.bias, self.norm1.eps, self.kqv.weight, self.kqv.bias,
                self.kernel_size, self.stride, self.padding)
        else:
            kqv = self._kqv(x)
        if not ops.is_plain(kqv, self.proj, self.norm2, idle=(self.dp, self.mlp)):
            return self._layer(kqv)
        modules: list[Any] = list(self.mlp)
        fc1, _, fc2, drop = modules
        y = ops.performer_skip(kqv, self.w, self.eps, self.proj.weight, self.proj.bias, _rate(self.dp))
        return ops.mlp_skip(
            y, self.norm2.weight, self.norm2.bias, self.norm2.eps,
            fc1.weight, fc1.bias, fc2.weight, fc2.bias, _rate(drop))


def _rate(dropout: nn.Dropout) -> float:
    return dropout.p if dropout.training else 0.  # its own mode: Monte Carlo dropout sets it apart from the layer's


@torch.fx.wrap
def performer_attention(kqv: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    """Return a for k, q, v, tokens (B, N, dim), in the dtype of kqv whatever autocast says."""
    if torch.jit.is_scripting():  # a graph of fx that is scripted
        return ops.performer_attention(kqv, w, eps).to(kqv.dtype)
    else:
        return ops.autocast_off(ops.performer_attention)(kqv, w, eps).to(kqv.dtype)
