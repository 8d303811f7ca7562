"""Token Performer: the T2T transformer with linear attention (paper section 3.1; Performer, arXiv 2009.14794)."""
import math
from typing import Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_function
from torch.utils.checkpoint import checkpoint

from .observe import in_autocast, is_observed, is_plain
from .soft_split import soft_split, soft_split_norm_linear, soft_split_size, tokens_to_map

torch.fx.wrap('soft_split_norm_linear')  # fx looks for a wrapped function under the name its caller has

__all__ = ['TokenPerformer', 'performer_attention']


class TokenPerformer(nn.Module):
    """Soft split followed by one Performer layer, the re-structurization of a tokens-to-token step.

    With u the unfolded patches, phi the positive random features (Performer, lemma 1) and m of them,

        k, q, v = kqv(norm1(u)),    phi(x) = exp(w x - |x|^2 / 2) / sqrt(m)
        a = phi(q) (phi(k)' v) / (phi(q) phi(k)' 1 + 1e-8)
        y = v + proj(a),    out = y + mlp(norm2(y))

    The values are the skip connection, since the width changes.
    """

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
        """Draw the random features: orthogonal rows times sqrt(m) (Performer, section 2.4)."""
        w = torch.empty_like(self.w, dtype=torch.float32)
        if not w.is_meta:
            nn.init.orthogonal_(w)
        self.w.copy_(w * math.sqrt(self.num_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_dim, H, W) to (B, dim, H', W')."""
        if not torch.jit.is_scripting():
            if self.training and not self._traced(x) and not is_observed(self.dp, self.mlp):
                height, width = self._grid(x)
                keep = [self._draw_keep(x, height * width, drop.p) for drop in (self.dp, self.mlp[3])]
                if is_observed(self) or not torch.is_grad_enabled():
                    return self._forward(x, *keep)
                # Kept as it is, the first step alone would hold what three blocks of the backbone hold. Making it again
                # costs little, but for the dropout, whose choice is therefore drawn here, once.
                return checkpoint(self._forward, x, *keep, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x)

    @torch.jit.unused
    def _traced(self, x: torch.Tensor) -> bool:
        return isinstance(x, torch.fx.Proxy) or torch.compiler.is_compiling()

    @torch.jit.unused
    def _draw_keep(self, x: torch.Tensor, num_tokens: int, drop: float) -> Optional[torch.Tensor]:
        return torch.rand(x.shape[0], num_tokens, self.dim, device=x.device) >= drop if drop > 0. else None

    def _grid(self, x: torch.Tensor) -> Tuple[int, int]:
        return (
            soft_split_size(x.shape[2], self.kernel_size, self.stride, self.padding),
            soft_split_size(x.shape[3], self.kernel_size, self.stride, self.padding),
        )

    def _forward(
            self,
            x: torch.Tensor,
            keep_proj: Optional[torch.Tensor] = None,
            keep_mlp: Optional[torch.Tensor] = None,
    ) -> torch.Tensor:
        height, width = self._grid(x)
        kqv = self._split_kqv(x)
        v, a = kqv[..., 2 * self.dim:], self._attention(kqv)
        x = v + (self.dp(a) if keep_proj is None else a * keep_proj / (1. - self.dp.p))
        y = self.norm2(x)
        if keep_mlp is None:
            y = self.mlp(y)
        else:
            y = self.mlp[2](self.mlp[1](self.mlp[0](y))) * keep_mlp / (1. - self.mlp[3].p)
        return tokens_to_map(x + y, height, width)

    def _split_kqv(self, x: torch.Tensor) -> torch.Tensor:
        """Return kqv(norm1(soft_split(x))), tokens (B, N, 3 * dim)."""
        if not torch.jit.is_scripting():
            if not is_plain(self.norm1, self.kqv):
                return self.kqv(self.norm1(soft_split(x, self.kernel_size, self.stride, self.padding)))
        x = soft_split_norm_linear(
            x, self.norm1.weight, self.norm1.bias, self.kqv.weight, self.kqv.bias, self.norm1.eps,
            self.kernel_size, self.stride, self.padding,
        )
        return x.flatten(2).transpose(1, 2)

    def _attention(self, kqv: torch.Tensor) -> torch.Tensor:
        """Return proj(a), tokens (B, N, dim)."""
        if not torch.jit.is_scripting():
            if not is_plain(self.proj):
                return self.proj(performer_attention(kqv, self.w, self.eps))
        return performer_attention(kqv, self.w, self.eps, self.proj.weight) + self.proj.bias


@torch.fx.wrap
@register_notrace_function
def performer_attention(
        kqv: torch.Tensor,
        w: torch.Tensor,
        eps: float,
        weight: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Linear attention through positive random features, followed by a linear map if one is given.

    With phi(x) = e(x) / sqrt(m), the 1 / m of every product cancels but for eps, which becomes m eps; and

        W (phi(q) (phi(k)'v))' = phi(q) (phi(k)'v W')'

    so the linear map acts on the m x dim product of each image instead of on its tokens. Half-precision input is
    computed in float32, whatever the autocast dtype: e(x) reaches e^16, past float16.

    Args:
        kqv: Keys, queries and values, (B, N, 3 * dim).
        w: Random features, (m, dim).
        eps: Added to the denominator.
        weight: Weight of the linear map, (dim, dim), or None.

    Returns:
        Tokens of shape (B, N, dim), in the dtype of kqv.
    """
    if not torch.jit.is_scripting():
        if in_autocast(kqv):
            with torch.autocast(kqv.device.type, enabled=False):
                return performer_attention(kqv, w, eps, weight)
        if torch.is_grad_enabled() and kqv.requires_grad and not torch.compiler.is_compiling():
            return _PerformerAttention.apply(kqv, w, eps, weight)[0]
    k, q, norm, kv = _performer_parts(kqv, w, eps)
    if weight is not None:
        kv = F.linear(kv, _widen(weight))
    return ((q / norm) @ kv).to(kqv.dtype)


def _widen(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


def _features(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return e(x) = exp(w x - |x|^2 / 2), (B, N, m)."""
    return torch.exp(F.linear(x, _widen(w)) - 0.5 * x.square().sum(dim=-1, keepdim=True))


def _performer_parts(
        kqv: torch.Tensor,
        w: torch.Tensor,
        eps: float,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return e(k) and e(q), (B, N, m); n = e(q) (sum_n e(k_n)) + m eps, (B, N, 1); and e(k)'v, (B, m, dim)."""
    k, q, v = _widen(kqv).split(w.shape[1], dim=-1)
    k, q = _features(k, w), _features(q, w)
    norm = q @ k.sum(dim=1).unsqueeze(-1) + eps * w.shape[0]
    return k, q, norm, k.transpose(1, 2) @ v


class _PerformerAttention(torch.autograd.Function):
    """`performer_attention` with its gradient written out.

    With k = e(K), q = e(Q), n = q (sum k) + m eps, p = q / n, S = k'V W' and the output p S,

        dS = p'g,   dq = (g S' + d 1') / n where d = -(rowsum(p * g S')) (sum k),   de(x)/dx = e(x) (w - x)

    which goes into one tensor of the shape of kqv, where autograd would concatenate three, and fewer passes over it.
    """

    @staticmethod
    def forward(kqv, w, eps, weight):
        k, q, norm, kv = _performer_parts(kqv, w, eps)
        out = kv if weight is None else F.linear(kv, _widen(weight))
        return ((q / norm) @ out).to(kqv.dtype), k, q, norm, kv

    @staticmethod
    def setup_context(ctx, inputs, output):
        kqv, w, ctx.eps, weight = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(kqv, w, weight, *output[1:])

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return None, None, None, None
        kqv, w, weight, k, q, norm, kv = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative looks through the parts, not around them
            k, q, norm, kv = _performer_parts(kqv, w, ctx.eps)
        grad, w = _widen(grad), _widen(w)
        K, Q, V = _widen(kqv).split(w.shape[1], dim=-1)
        p = q / norm
        out_kv = kv if weight is None else F.linear(kv, _widen(weight))

        grad_kv = p.transpose(1, 2) @ grad
        grad_weight = None
        if weight is not None:
            grad_weight = torch.einsum('bmo,bmi->oi', grad_kv, kv).to(weight.dtype)
            grad_kv = grad_kv @ _widen(weight)
        grad_p = grad @ out_kv.transpose(1, 2)
        grad_norm = -(p * grad_p).sum(dim=-1, keepdim=True) / norm
        grad_q = (grad_p / norm + grad_norm * k.sum(dim=1, keepdim=True)) * q
        grad_k = (V @ grad_kv.transpose(1, 2) + grad_norm.transpose(1, 2) @ q) * k
        grad_kqv = torch.empty_like(kqv)
        dim = w.shape[1]
        grad_kqv[..., :dim] = grad_k @ w - grad_k.sum(dim=-1, keepdim=True) * K
        grad_kqv[..., dim:2 * dim] = grad_q @ w - grad_q.sum(dim=-1, keepdim=True) * Q
        grad_kqv[..., 2 * dim:] = k @ grad_kv
        return grad_kqv, None, None, grad_weight
