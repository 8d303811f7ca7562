r"""The Performer's attention (arXiv 2009.14794, FAVOR+), as published and in log space, with its gradient.

With w_i the m random features, e(x)_i = exp(w_i.x - |x|^2 / 2) and phi = e / sqrt(m),

    a = phi(q) (phi(k)' v) / (phi(q) phi(k)' 1 + eps)                                                  (1)

Let t_ni = w_i.k_n - |k_n|^2 / 2,  P = softmax of t over the tokens n,  L_i = logsumexp of t over n. Then phi(k)' v is
exp(L_i) (P'v)_i / sqrt(m), and (1) multiplied by m exp(|q|^2 / 2), above and below, reads

    a_n = sum_i R_ni (P'v)_i,    R_n = softmax over i of w_i.q_n + L_i,  with one more logit |q_n|^2 / 2 + log(m eps)

whose share goes to nothing: an attention sink. All is a share of something, at most 1, so no dtype overflows, and eps
keeps its meaning. The linear map that follows acts on the m x dim product: W (R P'v)' = R (P'v W')'.
"""
import math
from typing import Optional, Tuple

import torch
import torch.nn.functional as F

from .dropout import add_dropout, dropout, dropout_backward
from .gate import is_recorded
from .precision import autocast_off, square_sum, widen

__all__ = ['performer_attention', 'performer_skip']


def _features(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Return e(x), (B, N, m)."""
    return torch.exp(x @ w.t() - 0.5 * (x * x).sum(dim=-1, keepdim=True))


def performer_attention(
        kqv: torch.Tensor,
        w: torch.Tensor,
        eps: float,
        weight: Optional[torch.Tensor] = None,
) -> torch.Tensor:
    """Return the attention a of equation (1), or W a, in float32 or wider: e(x) reaches e^16, past float16.

    Args:
        kqv: Keys, queries and values, (B, N, 3 * dim).
        w: Random features, (m, dim).
        eps: Added to the denominator.
        weight: Weight W of a linear map that follows, (dim, dim), or None.

    Returns:
        Tokens of shape (B, N, dim).
    """
    if kqv.dtype != torch.float64:
        kqv, w = kqv.float(), w.float()
    k, q, v = kqv.chunk(3, dim=-1)
    k, q = _features(k, w), _features(q, w)
    kv = k.transpose(1, 2) @ v
    if weight is not None:
        kv = kv @ weight.to(kv.dtype).t()
    denominator = q @ k.sum(dim=1).unsqueeze(-1) + eps * w.shape[0]  # the 1 / m of both products, and of eps
    return (q / denominator) @ kv


def performer_skip(
        kqv: torch.Tensor,
        w: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
        bias: torch.Tensor,
        drop: float = 0.,
) -> torch.Tensor:
    """Return `v + dropout(linear(a))`, in the dtype of kqv.

    Args:
        kqv: Keys, queries and values, (B, N, 3 * dim).
        w: Random features, (m, dim).
        eps: Added to the denominator.
        weight: Weight of the linear map, (dim, dim).
        bias: Its bias, (dim,).
        drop: Dropout rate, in training.

    Returns:
        Tokens of shape (B, N, dim).
    """
    with autocast_off(kqv):
        if is_recorded():
            y = (performer_attention(kqv, w, eps, weight) + bias).to(kqv.dtype)
            return add_dropout(kqv[..., 2 * w.shape[1]:], y, drop)
        w, weight, bias = w.to(kqv.dtype), weight.to(kqv.dtype), bias.to(kqv.dtype)
        if torch.is_grad_enabled() and (kqv.requires_grad or weight.requires_grad):
            return _PerformerSkip.apply(kqv, w, eps, weight, bias, drop)
        r, p, z = _shares(kqv, w, eps)
        y = torch.baddbmm(bias, r, F.linear(z, weight))
        return add_dropout(kqv[..., 2 * w.shape[1]:], y, drop)


def _softmax_sum(logits: torch.Tensor, dim: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return the softmax over an axis, and the logarithm of its denominator, in float32 or wider."""
    shares = logits.softmax(dim=dim)
    return shares, widen(logits.amax(dim=dim, keepdim=True)) - widen(shares.amax(dim=dim, keepdim=True)).log()


def _half_norm(x: torch.Tensor) -> torch.Tensor:
    """Return |x|^2 / 2, (B, N, 1), in float32 or wider, within the range of x."""
    return (square_sum(x, -1) / 2).clamp(max=torch.finfo(x.dtype).max / 2)


def _shares(kqv: torch.Tensor, w: torch.Tensor, eps: float) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return R and P, (B, N, m), and P'v, (B, m, dim)."""
    k, q, v = kqv.split(w.shape[1], dim=-1)
    w_t = w.t().expand(len(kqv), -1, -1)
    p, log_sum = _softmax_sum(torch.baddbmm(_half_norm(k).to(k.dtype), k, w_t, beta=-1), 1)
    top = log_sum.amax(dim=-1, keepdim=True)  # taken from the logits, so that half precision resolves them
    r, log_total = _softmax_sum(torch.baddbmm((log_sum - top).to(q.dtype), q, w_t), -1)
    sink = _half_norm(q) - top + (math.log(eps * len(w)) if eps > 0. else -math.inf)
    r = r * torch.sigmoid(log_total - sink).to(r.dtype)
    return r, p, p.transpose(1, 2) @ v


class _PerformerSkip(torch.autograd.Function):
    """`performer_skip` with its gradient, which needs fewer tensors and passes than autograd's.

    With R, P, Z = P'v as above, S = Z W' and g the gradient of R S + b,

        dS = R'g,  dZ = dS W,    dl = R (g S' - rowsum(R g S')),  dL = colsum(dl),  dq = dl w - rowsum(dl) q
        dt = P (v dZ' - Z.dZ + dL),  dk = dt w - rowsum(dt) k,    dv = P dZ + the skip's

    The logits of a softmax, the sink's among them, have gradients that sum to zero: hence - rowsum(dl) for |q|^2 / 2.
    """

    @staticmethod
    def forward(ctx, kqv, w, eps, weight, bias, drop):
        r, p, z = _shares(kqv, w, eps)
        y, mask = dropout(torch.baddbmm(bias, r, F.linear(z, weight)), drop)
        ctx.eps, ctx.drop = eps, drop
        ctx.save_for_backward(kqv, w, weight, mask, r, p, z)
        return y.add_(kqv[..., 2 * w.shape[1]:])

    @staticmethod
    def backward(ctx, grad):
        kqv, w, weight, mask, *shares = ctx.saved_tensors
        with autocast_off(grad):
            grad_y = dropout_backward(grad, mask, ctx.drop)
            if torch.is_grad_enabled():  # second derivatives are those of the equations
                shares = _shares(kqv, w, ctx.eps)
            grad_kqv, grad_weight = _performer_skip_backward(grad, grad_y, kqv, w, weight, *shares)
            return grad_kqv, None, None, grad_weight, grad_y.sum(dim=(0, 1)), None


def _softmax_backward(grad: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    return torch._softmax_backward_data(grad, shares, -1, shares.dtype)


def _performer_skip_backward(grad, grad_y, kqv, w, weight, r, p, z):
    """Return the gradients of kqv and weight, in the notation of `_PerformerSkip`."""
    k, q, v = kqv.split(w.shape[1], dim=-1)
    w = w.expand(len(kqv), -1, -1)

    grad_s = r.transpose(1, 2) @ grad_y
    grad_z = grad_s @ weight
    grad_l = _softmax_backward(grad_y @ F.linear(z, weight).transpose(1, 2), r)
    shift = grad_l.sum(dim=1, keepdim=True) - (z * grad_z).sum(dim=-1).unsqueeze(1)
    grad_t = torch.baddbmm(shift, v, grad_z.transpose(1, 2)) * p

    grad_k = torch.baddbmm(k * grad_t.sum(dim=-1, keepdim=True), grad_t, w, beta=-1)
    grad_q = torch.baddbmm(q * grad_l.sum(dim=-1, keepdim=True), grad_l, w, beta=-1)
    grad_v = torch.baddbmm(grad, p, grad_z)
    return torch.cat([grad_k, grad_q, grad_v], dim=-1), torch.einsum('bmo,bmi->oi', grad_s, z)
