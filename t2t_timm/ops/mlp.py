"""GELU and linear map of an MLP, which on a CPU keep less for their gradient."""

import torch
import torch.nn.functional as F

from .dropout import add_dropout
from .gate import is_compiled
from .precision import autocast_off, cast, product_dtype

__all__ = ['gelu_linear', 'keeps_less', 'mlp_skip']


def keeps_less() -> bool:
    """Return True if `gelu_linear` may keep less for a gradient than the modules that it stands for."""
    return torch.is_grad_enabled() and not is_compiled()


def gelu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `linear(gelu(x))`; on a CPU its gradient keeps x and makes gelu(x) again.

    The activation is the widest tensor of a block, as wide as x. To make it again costs a CPU a hundredth of the block;
    a GPU, which is short of bandwidth, keeps it.

    Args:
        x: Hidden tokens of shape (B, N, hidden).
        weight: Weight of the linear map, (D, hidden).
        bias: Its bias, (D,), or None.

    Returns:
        Tokens of shape (B, N, D).
    """
    if not keeps_less() or not x.requires_grad or x.device.type != 'cpu':
        return F.linear(F.gelu(x), weight, bias)
    dtype = product_dtype(x)
    return _gelu_linear(cast(x, dtype), cast(weight, dtype), None if bias is None else cast(bias, dtype))


@autocast_off
def _gelu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _GeluLinear.apply(x, weight, bias)


class _GeluLinear(torch.autograd.Function):

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        grad_y, tokens = grad @ weight, grad.flatten(0, -2)
        grad_weight = tokens.t() @ F.gelu(x).flatten(0, -2) if ctx.needs_input_grad[1] else None
        grad_bias = tokens.sum(dim=0) if ctx.needs_input_grad[2] else None
        return torch.ops.aten.gelu_backward(grad_y, x), grad_weight, grad_bias


@autocast_off
def mlp_skip(
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        eps: float,
        weight1: torch.Tensor,
        bias1: torch.Tensor | None,
        weight2: torch.Tensor,
        bias2: torch.Tensor | None,
        drop: float = 0.,
) -> torch.Tensor:
    """Return `x + dropout(linear2(gelu(linear1(norm(x)))))`, in the dtype of x throughout.

    Args:
        x: Tokens of shape (B, N, D).
        norm_weight: Gain of the LayerNorm, (D,).
        norm_bias: Its bias, (D,).
        eps: Its eps.
        weight1: Weight of the first linear map, (hidden, D).
        bias1: Its bias, (hidden,), or None.
        weight2: Weight of the second linear map, (D, hidden).
        bias2: Its bias, (D,), or None.
        drop: Dropout rate, in training.
    """
    norm_weight, norm_bias, weight1, weight2 = (cast(t, x.dtype) for t in (norm_weight, norm_bias, weight1, weight2))
    bias1, bias2 = (None if t is None else cast(t, x.dtype) for t in (bias1, bias2))
    y = F.layer_norm(x, (x.shape[-1],), norm_weight, norm_bias, eps)
    return add_dropout(x, gelu_linear(F.linear(y, weight1, bias1), weight2, bias2), drop)
