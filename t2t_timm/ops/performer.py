r"""The Performer's attention (arXiv 2009.14794, FAVOR+) in log space, with its gradient.

With w_i the m random features, e(x)_i = exp(w_i.x - |x|^2 / 2) and phi = e / sqrt(m),

    a = phi(q) (phi(k)' v) / (phi(q) phi(k)' 1 + eps)                                                  (1)

Let t_ni = w_i.k_n - |k_n|^2 / 2,  T_i = max of t over the tokens n,  E = exp(t - T),  U_i = sum of E over n,  P = E / U
and L = T + log U. Then phi(k)' v is exp(L_i) (P'v)_i / sqrt(m), and (1) times m exp(|q|^2 / 2), above and below, reads

    a_n = sum_i R_ni (P'v)_i,    R_n = softmax over i of w_i.q_n + L_i,  with one more logit |q_n|^2 / 2 + log(m eps)

whose share goes to nothing: an attention sink. Every factor is at most 1, so no dtype overflows, and eps keeps its
meaning. The linear map that follows acts on the m x dim product, R (P'v W'), the sink having a row of zeros.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from .execution import autocast_off, cast, is_compiled, is_traced, params, square_sum, wide_dtype

SUM_TOKENS = 2 ** 10  # sums over more tokens are scaled down to as many, so that values of 60 stay in float16's range
TRACED_SCALE = 2 ** 6  # the same for graphs of any size
MAX_HALF_NORM = 2. ** 15 - 2. ** 5
SINKS = 8  # columns for the sink: one, and seven of no share, since matrix products like multiples of 8


@autocast_off
def performer_skip(kqv: torch.Tensor, w: torch.Tensor, eps: float, linear: nn.Linear, drop: float = 0.) -> torch.Tensor:
    """Return `v + dropout(linear(a))`, (B, N, dim), in the dtype of kqv, with the attention a of equation (1).

    kqv holds keys, queries and values, (B, N, 3 * dim), w the random features, (m, dim); eps is added to the
    denominator; `drop` is the dropout rate: 0 unless in training.
    """
    if is_traced():
        return _traced_skip(kqv, w, eps, linear, drop)
    return _PerformerSkip.apply(kqv, cast(w, kqv.dtype), eps, *params(linear, kqv.dtype), drop)


def _traced_skip(kqv, w, eps, linear, drop):
    """The same in operations that runtimes know, none in place; in float32 or wider, but safe where that is float16."""
    dtype, wide = kqv.dtype, wide_dtype(kqv)
    kqv, w, (weight, bias) = cast(kqv, wide), cast(w, wide), params(linear, wide)
    m, dim = w.shape
    k, q, v = kqv.reshape(kqv.shape[0], kqv.shape[1], 3, dim).unbind(2)  # split() would fix the batch size
    # Where these bounds act, shares are nothing: as a rule |w_i|^2 is m.
    half_k, half_q = ((0.5 * (x * x).sum(dim=-1)).clamp(max=MAX_HALF_NORM) for x in (k, q))
    t = F.linear(k, w).transpose(1, 2) - half_k.unsqueeze(1)
    top = t.detach().amax(dim=-1, keepdim=True) + math.log(TRACED_SCALE)
    e = (t - top).exp()
    total = e.sum(dim=-1, keepdim=True)
    z = F.linear(e @ v / total, weight)
    log_sum = (top + total.log()).transpose(1, 2)
    top = log_sum.amax(dim=-1, keepdim=True)
    sink = half_q.unsqueeze(-1) + ((math.log(eps * m) if eps > 0. else -math.inf) - top)
    r = torch.cat([F.linear(q, w) + (log_sum - top), sink], dim=-1).softmax(dim=-1)
    y = cast(r @ (F.pad(z, (0, 0, 0, 1)) + bias), dtype)  # the shares of a token sum to 1
    return cast(v, dtype) + (F.dropout(y, drop) if drop > 0. else y)


def _shares(kqv, w, eps):
    """Return R, (B, N, m + SINKS), E, (B, N, m), U, (B, m, 1), and P'v, (B, m + SINKS, dim)."""
    m = len(w)
    k, q, v = kqv.split(w.shape[1], dim=-1)
    half_norms = (square_sum(kqv.unflatten(-1, (3, -1))[:, :, :2], -1) / 2).clamp(max=torch.finfo(kqv.dtype).max / 2)
    half_k, half_q = half_norms.unbind(2)

    t = _baddbmm(half_k.to(k.dtype), k, w.t().expand(len(k), -1, -1), beta=-1.)
    top = t.detach().amax(dim=1, keepdim=True)  # a constant, which cancels
    e = t.sub_(top).exp_()
    total = e.sum(dim=1, keepdim=True, dtype=wide_dtype(e))
    log_sum = top + total.log()
    total = total.transpose(1, 2)
    z, scale = _sum_products(e, v)
    z = (z / (total * scale)).to(v.dtype)

    top = log_sum.amax(dim=-1, keepdim=True)  # subtracted, since half precision would not resolve the logits with it
    log_sum = F.pad(F.pad(log_sum - top, (0, 1)), (0, SINKS - 1), value=-math.inf)
    logits = _baddbmm(log_sum.to(q.dtype), q, F.pad(w, (0, 0, 0, SINKS)).t().expand(len(q), -1, -1))
    logits[..., m] = (half_q - top + (math.log(eps * m) if eps > 0. else -math.inf)).squeeze(-1)
    return logits.softmax(dim=-1), e, total, F.pad(z, (0, 0, 0, SINKS))


def _sum_products(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Return x'y, (B, N, m) by (B, N, D), times a scale that is applied before it is rounded, and the scale."""
    scale = min(1., SUM_TOKENS / x.shape[1])
    return torch.baddbmm(x.new_empty(1, 1, 1), x.transpose(1, 2), y, beta=0, alpha=scale), scale


def _baddbmm(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor, beta: float = 1.) -> torch.Tensor:
    """Return beta * x + y z; compilers add while they compute what comes next, and would copy x for baddbmm."""
    return beta * x + torch.bmm(y, z) if is_compiled() else torch.baddbmm(x, y, z, beta=beta)


class _PerformerSkip(torch.autograd.Function):
    """`performer_skip` with its gradient, which needs fewer tensors and passes than autograd's.

    With R, P, Z = P'v as above, S = Z W' and g the gradient of R S + b,

        dS = R'g,  dZ = dS W,    dl = R (g S' - rowsum(R g S')),  dL = colsum(dl),  dq = dl w + dl_sink q
        dt = P (v dZ' - Z.dZ + dL),  dk = dt w - rowsum(dt) k,    dv = P dZ + the skip's
    """

    @staticmethod
    def forward(ctx, kqv, w, eps, weight, bias, drop):
        r, e, total, z = _shares(kqv, w, eps)
        v, s = kqv[..., 2 * w.shape[1]:], F.linear(z, weight) + bias  # the shares of a token sum to 1
        if drop == 0.:
            y, mask = _baddbmm(v, r, s), None
        else:
            y, mask = torch.native_dropout(r @ s, drop, True)
            y.add_(v)
        ctx.eps, ctx.drop = eps, drop
        ctx.save_for_backward(kqv, w, weight, mask, r, e, total, z)
        return y

    @staticmethod
    def backward(ctx, grad):
        kqv, w, weight, mask, *shares = ctx.saved_tensors
        grad_y = grad
        if mask is not None:
            scale = 1 / (1 - ctx.drop) if ctx.drop < 1. else 0.
            grad_y = torch.ops.aten.native_dropout_backward(grad, mask, scale)
        if torch.is_grad_enabled():  # Second derivatives need the shares as functions of kqv.
            shares = _shares(kqv, w, ctx.eps)
        grad_kqv, grad_weight = _performer_skip_backward(grad, grad_y, kqv, w, weight, *shares)
        return grad_kqv, None, None, grad_weight, grad_y.sum(dim=(0, 1)), None


@autocast_off
def _performer_skip_backward(grad, grad_y, kqv, w, weight, r, e, total, z):
    """Return the gradients of kqv and weight, in the notation of `_PerformerSkip`."""
    k, q, v = kqv.split(w.shape[1], dim=-1)
    m = len(w)

    grad_s, scale = _sum_products(r, grad_y)  # this and grad_z are scaled
    grad_z = (grad_s @ weight)[:, :m]
    grad_l = torch._softmax_backward_data(grad_y @ F.linear(z, weight).transpose(1, 2), r, -1, r.dtype)
    shift = scale * grad_l[..., :m].sum(dim=1, dtype=total.dtype).unsqueeze(-1)
    shift = shift - (z[:, :m] * grad_z).sum(dim=-1, keepdim=True, dtype=total.dtype)
    grad_z, shift = ((t / (total * scale)).to(v.dtype) for t in (grad_z, shift))  # E stands for P below
    grad_t = _baddbmm(shift.transpose(1, 2), v, grad_z.transpose(1, 2)) * e

    # reshape() has a batching rule, which flatten() and einsum() lack where vmap meets a written gradient.
    grad_weight = grad_s.reshape(-1, z.shape[-1]).t() @ z.reshape(-1, z.shape[-1]) / scale
    k_rate, q_rate = grad_t.sum(dim=-1, keepdim=True), grad_l[..., m:m + 1]
    w, w_sinks = (t.expand(len(k), -1, -1) for t in (w, F.pad(w, (0, 0, 0, SINKS))))
    if torch.is_grad_enabled() or is_compiled() or torch._C._functorch.is_legacy_batchedtensor(grad):
        grad_k = _baddbmm(k * k_rate, grad_t, w, beta=-1.)
        grad_q = _baddbmm(q * q_rate, grad_l, w_sinks)
        return torch.cat([grad_k, grad_q, _baddbmm(grad, e, grad_z)], dim=-1), grad_weight
    grad_kqv = torch.empty_like(kqv)  # Written in place: baddbmm() would copy its first argument, and cat() all three.
    grad_k, grad_q, grad_v = grad_kqv.split(w.shape[-1], dim=-1)
    torch.mul(k, k_rate, out=grad_k).baddbmm_(grad_t, w, beta=-1)
    torch.mul(q, q_rate, out=grad_q).baddbmm_(grad_l, w_sinks)
    grad_v.copy_(grad).baddbmm_(e, grad_z)
    return grad_kqv, grad_weight
