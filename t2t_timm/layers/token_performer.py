"""Token Performer: the T2T transformer with linear attention (paper section 3.1; Performer, arXiv 2009.14794)."""
import math
from typing import Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_function

from .dropout import add_dropout, draw_dropout, dropout_factor
from .mlp import gelu_linear, is_gelu_linear
from .observe import in_autocast, is_exported, is_observed, is_plain
from .soft_split import (
    fold_modules,
    soft_split,
    soft_split_folded_linear,
    soft_split_norm_linear,
    soft_split_size,
    tokens_to_map,
)

# fx looks for a wrapped function under the name its caller has
torch.fx.wrap('soft_split_folded_linear')
torch.fx.wrap('soft_split_norm_linear')

__all__ = ['TokenPerformer', 'performer_attention', 'performer_skip']


class TokenPerformer(nn.Module):
    """Soft split followed by one Performer layer, the re-structurization of a tokens-to-token step.

    With u the unfolded patches, phi the positive random features (Performer, lemma 1) and m of them,

        k, q, v = kqv(norm1(u)),    phi(x) = exp(w x - |x|^2 / 2) / sqrt(m)
        a = phi(q) (phi(k)' v) / (phi(q) phi(k)' 1 + 1e-8)
        y = v + proj(a),    out = y + mlp(norm2(y))

    The values are the skip connection, since the width changes.
    """
    folded: torch.jit.Final[bool]

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
        self.folded = False
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

    def reparameterize(self) -> None:
        """Store the weights that the norm is folded into, for inference; `timm.utils.reparameterize_model` calls it."""
        if not self.folded and is_plain(self.norm1, self.kqv):
            self.norm1, self.kqv = fold_modules(self.norm1, self.kqv)
            self.folded = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_dim, H, W) to (B, dim, H', W')."""
        height, width = self._grid(x)
        x = self._attend(self._split_kqv(x))
        return tokens_to_map(self._add_mlp(x), height, width)

    def _grid(self, x: torch.Tensor) -> Tuple[int, int]:
        return (
            soft_split_size(x.shape[2], self.kernel_size, self.stride, self.padding),
            soft_split_size(x.shape[3], self.kernel_size, self.stride, self.padding),
        )

    def _add_mlp(self, x: torch.Tensor) -> torch.Tensor:
        """Return out = y + mlp(norm2(y)), tokens (B, N, dim)."""
        if not torch.jit.is_scripting():
            fc1, act, fc2, drop = self.mlp
            if not is_exported(x) and not is_observed(self.mlp):
                y = fc1(self.norm2(x))
                y = gelu_linear(y, fc2.weight, fc2.bias) if is_gelu_linear(y, act, fc2) else fc2(act(y))
                return add_dropout(x, y, drop.p if drop.training else 0.)
        return x + self.mlp(self.norm2(x))

    def _split_kqv(self, x: torch.Tensor) -> torch.Tensor:
        """Return kqv(norm1(soft_split(x))), tokens (B, N, 3 * dim)."""
        if not torch.jit.is_scripting():
            if not is_plain(self.norm1, self.kqv):
                return self.kqv(self.norm1(soft_split(x, self.kernel_size, self.stride, self.padding)))
        kernel = self.kernel_size, self.stride, self.padding
        weight, bias = self.kqv.weight, self.kqv.bias
        if self.folded:
            x = soft_split_folded_linear(x, weight, bias, self.norm1.eps, *kernel)
        else:
            x = soft_split_norm_linear(x, self.norm1.weight, self.norm1.bias, weight, bias, self.norm1.eps, *kernel)
        return x.flatten(2).transpose(1, 2)

    def _attend(self, kqv: torch.Tensor) -> torch.Tensor:
        """Return y = v + proj(a), tokens (B, N, dim)."""
        if not torch.jit.is_scripting():
            if not is_plain(self.proj) or is_observed(self.dp):
                return kqv[..., 2 * self.dim:] + self.dp(self.proj(performer_attention(kqv, self.w, self.eps)))
        drop = self.dp.p if self.dp.training else 0.  # its own mode: Monte Carlo dropout sets it apart
        return performer_skip(kqv, self.w, self.eps, self.proj.weight, self.proj.bias, drop)


@torch.fx.wrap
@register_notrace_function
def performer_attention(kqv: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
    """Linear attention through positive random features.

    Half-precision input is computed in float32, whatever the autocast dtype: exp(w x - |x|^2 / 2) reaches e^16, past
    float16.

    Args:
        kqv: Keys, queries and values, (B, N, 3 * dim).
        w: Random features, (m, dim).
        eps: Added to the denominator.

    Returns:
        Tokens a of shape (B, N, dim), in the dtype of kqv.
    """
    if not torch.jit.is_scripting():
        if in_autocast(kqv):
            with torch.autocast(kqv.device.type, enabled=False):
                return performer_attention(kqv, w, eps)
    p, kv = _performer_parts(kqv, w, eps)[:2]
    return (p @ kv).to(kqv.dtype)


@torch.fx.wrap
@register_notrace_function
def performer_skip(
        kqv: torch.Tensor,
        w: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
        bias: torch.Tensor,
        drop: float = 0.,
) -> torch.Tensor:
    """Return `v + dropout(linear(a))` with the tokens a of `performer_attention`.

    The product phi(k)'v is m x dim for each image, and

        W (phi(q) (phi(k)'v))' = phi(q) (phi(k)'v W')'

    so the linear map acts there instead of on every token.

    Args:
        kqv: Keys, queries and values, (B, N, 3 * dim).
        w: Random features, (m, dim).
        eps: Added to the denominator.
        weight: Weight W of the linear map, (dim, dim).
        bias: Its bias, (dim,).
        drop: Dropout rate, in training; rounded to 2^-16.

    Returns:
        Tokens y of shape (B, N, dim), in the dtype of kqv.
    """
    if not torch.jit.is_scripting():
        if in_autocast(kqv):
            with torch.autocast(kqv.device.type, enabled=False):
                return performer_skip(kqv, w, eps, weight, bias, drop)
        if torch.is_grad_enabled() and kqv.requires_grad and not is_exported(kqv):
            draws = draw_dropout(kqv[..., :w.shape[1]], drop)
            return _PerformerSkip.apply(kqv, w, eps, weight, bias, drop, draws)[0]
    p, kv = _performer_parts(kqv, w, eps)[:2]
    y = torch.baddbmm(_widen(bias), p, F.linear(kv, _widen(weight)))
    v = _widen(kqv[..., 2 * w.shape[1]:])
    if not torch.jit.is_scripting():
        if not is_exported(kqv):
            return add_dropout(v, y, drop).to(kqv.dtype)
    if drop > 0.:
        y = F.dropout(y, drop)
    return (v + y).to(kqv.dtype)


def _widen(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype == torch.float16 or x.dtype == torch.bfloat16 else x


def _features(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return e(x) = exp(w x - |x|^2 / 2), (B, N, m)."""
    square = x.square().sum(dim=-1, keepdim=True)
    return torch.baddbmm(square, x, w.t().expand(x.shape[0], -1, -1), beta=-0.5).exp()


def _performer_parts(
        kqv: torch.Tensor,
        w: torch.Tensor,
        eps: float,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return p, (B, N, m), and k'v, (B, m, dim), whose product is a; k, (B, N, m), and its sum over n, (B, 1, m).

    With k = e(k_n), q = e(q_n), phi = e / sqrt(m), the 1 / m of every product cancels but for eps, which becomes m eps:

        a = p k'v,    p = q / n,    n = q (sum k)' + m eps
    """
    w = _widen(w)
    k, q, v = _widen(kqv).split(w.shape[1], dim=-1)
    k, q = _features(k, w), _features(q, w)
    k_sum = k.sum(dim=1, keepdim=True)
    return q / (q @ k_sum.transpose(1, 2) + eps * w.shape[0]), k.transpose(1, 2) @ v, k, k_sum


class _PerformerSkip(torch.autograd.Function):
    """`performer_skip` with its gradient written out, which needs fewer tensors and passes than autograd's.

    With p, k, k'v as in `_performer_parts`, e = exp(l) the features and S = k'v W', the gradient g of p S + b gives

        dS = p'g,    dp = g S',    d = -rowsum(p * dp),    dl(q) = (dp + d sum k) * p,
        d(k'v) = dS W,    dl(k) = (v d(k'v)' + 1 (d'p)) * k,    dv = k d(k'v) + the skip's,    dx = dl(x) (w - x)
    """
    generate_vmap_rule = True

    @staticmethod
    def forward(kqv, w, eps, weight, bias, drop, draws):
        p, kv, k, k_sum = _performer_parts(kqv, w, eps)
        y = torch.baddbmm(_widen(bias), p, F.linear(kv, _widen(weight)))
        v = _widen(kqv[..., 2 * w.shape[1]:])
        y = v + y if draws is None else torch.addcmul(v, y, dropout_factor(draws, drop, y.dtype))
        return y.to(kqv.dtype), p, kv, k, k_sum

    @staticmethod
    def setup_context(ctx, inputs, output):
        kqv, w, ctx.eps, weight, bias, ctx.drop, draws = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = bias.dtype
        ctx.save_for_backward(kqv, w, weight, draws, *output[1:])

    @staticmethod
    def backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 7
        if in_autocast(grad):
            with torch.autocast(grad.device.type, enabled=False):
                return _PerformerSkip.backward(ctx, grad)
        kqv, w, weight, draws, *parts = ctx.saved_tensors
        grad = _widen(grad)
        grad_y = grad if draws is None else grad * dropout_factor(draws, ctx.drop, grad.dtype)
        if torch.is_grad_enabled():  # second derivatives are those of the equations
            parts = _performer_parts(kqv, w, ctx.eps)
        grad_kqv, grad_weight = _performer_skip_backward(grad, grad_y, kqv, w, weight, *parts)
        grad_bias = grad_y.sum(dim=(0, 1)).to(ctx.bias_dtype)
        return grad_kqv.to(kqv.dtype), None, None, grad_weight.to(weight.dtype), grad_bias, None, None


def _performer_skip_backward(grad, grad_y, kqv, w, weight, p, kv, k, k_sum):
    """Return the gradients of kqv and weight, in the notation of `_PerformerSkip`."""
    K, Q, V = _widen(kqv).split(w.shape[1], dim=-1)
    weight, w = _widen(weight), _widen(w).expand(len(kqv), -1, -1)

    grad_S = p.transpose(1, 2) @ grad_y
    grad_kv = grad_S @ weight
    grad_q = grad_y @ F.linear(kv, weight).transpose(1, 2)  # of p so far
    d = (p * grad_q).sum(dim=-1, keepdim=True).neg_()
    grad_q = torch.addcmul(grad_q, d, k_sum).mul_(p)
    grad_k = torch.baddbmm(d.transpose(1, 2) @ p, V, grad_kv.transpose(1, 2)).mul_(k)

    grad_K = torch.baddbmm(K * grad_k.sum(dim=-1, keepdim=True), grad_k, w, beta=-1)
    grad_Q = torch.baddbmm(Q * grad_q.sum(dim=-1, keepdim=True), grad_q, w, beta=-1)
    grad_V = torch.baddbmm(grad, k, grad_kv)
    return torch.cat([grad_K, grad_Q, grad_V], dim=-1), torch.einsum('bmo,bmi->oi', grad_S, kv)
