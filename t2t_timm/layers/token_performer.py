"""Token Performer: the T2T transformer with linear attention (paper section 3.1; Performer, arXiv 2009.14794)."""
import math
from typing import Any

import torch
import torch.nn as nn

from .. import ops
from .soft_split import soft_split, soft_split_size, tokens_to_map


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
        self.split = (kernel_size, stride, padding)
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_dim, H, W) to (B, dim, H', W')."""
        height, width = soft_split_size(x.shape[2], *self.split), soft_split_size(x.shape[3], *self.split)
        if not torch.jit.is_scripting():
            if ops.can_fuse(x, self, *self.mlp.children()):
                return tokens_to_map(ops.in_chunks(self._fused, x, height * width), height, width)

        kqv = self.kqv(self.norm1(soft_split(x, *self.split)))
        a = performer_attention(kqv, self.w, self.eps)
        y = kqv[..., 2 * self.dim:] + self.dp(self.proj(a))
        return tokens_to_map(y + self.mlp(self.norm2(y)), height, width)

    @torch.jit.unused
    def _fused(self, x: torch.Tensor) -> torch.Tensor:
        """Return out, (B, N, dim), by fused operations."""
        fc1, _, fc2, drop = self.mlp
        x = ops.soft_split_norm_linear(x, self.norm1, self.kqv, self.split)
        x = ops.performer_skip(x, self.w, self.eps, self.proj, _rate(self.dp))
        return ops.mlp_skip(x, self.norm2, fc1, fc2, _rate(drop))


def _is_as_written(layer: TokenPerformer) -> bool:
    return (
        [type(m) for m in layer.mlp] == [nn.Linear, nn.GELU, nn.Linear, nn.Dropout]
        and layer.proj.bias is not None
        and ops.is_dense(layer.w) and not layer.w.requires_grad  # the written backward returns no gradient for w
    )


ops.register(
    TokenPerformer,
    check=_is_as_written,
    norm1=(nn.LayerNorm,), kqv=(nn.Linear,), dp=(nn.Dropout,), proj=(nn.Linear,), norm2=(nn.LayerNorm,),
    mlp=(nn.Sequential,),
)


def _rate(dropout: Any) -> float:
    # The dropout's own mode, since Monte Carlo dropout sets it separately.
    return dropout.p if dropout.training else 0.


@torch.fx.wrap
def performer_attention(kqv: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the attention a of `TokenPerformer`, (B, N, dim), in the dtype of kqv whatever autocast says.

    kqv holds keys, queries and values, (B, N, 3 * dim), w the random features, (m, dim); eps is added to the
    denominator. Computed in float32 or wider, since phi(x) reaches e^16, past float16.
    """
    if torch.jit.is_scripting():  # graphs of torch.fx can be scripted too
        return _attend(kqv, w, eps).to(kqv.dtype)
    else:
        return ops.autocast_off(_attend)(kqv, w, eps).to(kqv.dtype)


def _attend(kqv: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    if kqv.dtype == torch.float16 or kqv.dtype == torch.bfloat16:
        kqv, w = kqv.float(), w.float()
    kqv = kqv.unflatten(-1, (3, -1))
    x = kqv[:, :, :2]
    phi = torch.exp(x @ w.t() - 0.5 * (x * x).sum(dim=-1, keepdim=True))  # times sqrt(m)
    k, q = phi.unbind(-2)  # chunk() would fix the batch size of an exported graph
    denominator = q @ k.sum(dim=1).unsqueeze(-1) + eps * w.shape[0]  # the 1 / m of both products, and of eps
    return (q / denominator) @ (k.transpose(1, 2) @ kqv[:, :, 2])
