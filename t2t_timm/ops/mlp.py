"""The MLP of a layer, which on a CPU keeps less for its gradient: what is cheap to make again is made again."""

from typing import Any

import torch
import torch.nn.functional as F

from .dropout import add_dropout
from .gate import is_compiled
from .precision import autocast_off, cast, product_dtype

__all__ = ['gelu_linear', 'keeps_less', 'mlp_skip']


def keeps_less(x: torch.Tensor) -> bool:
    """Return True if what a linear map reads, GELU(x) or norm(x), is made again in the gradient.

    It costs a CPU a hundredth of the block; a GPU, which is short of bandwidth, keeps it.
    """
    return torch.is_grad_enabled() and x.requires_grad and x.device.type == 'cpu' and not is_compiled()


def gelu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return `linear(gelu(x))`; where `keeps_less` its gradient keeps x alone, the widest tensor of a block.

    Args:
        x: Hidden tokens of shape (B, N, hidden).
        weight: Weight of the linear map, (D, hidden).
        bias: Its bias, (D,), or None.

    Returns:
        Tokens of shape (B, N, D).
    """
    if not keeps_less(x):
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
        grad_x = torch.ops.aten.gelu_backward(grad @ weight, x)
        return grad_x, *_linear_gradients(grad, F.gelu(x), *ctx.needs_input_grad[1:])


def _linear_gradients(grad: torch.Tensor, x: torch.Tensor, of_weight: bool, of_bias: bool) -> tuple[Any, Any]:
    """Return the gradients of weight and bias of `linear(x)`, each if it is asked for."""
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    return grad.t() @ x if of_weight else None, grad.sum(dim=0) if of_bias else None


@autocast_off
def mlp_skip(
        x: torch.Tensor,
        norm_weight: torch.Tensor | None,
        norm_bias: torch.Tensor | None,
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
        norm_weight: Gain of the LayerNorm, (D,), or None.
        norm_bias: Its bias, (D,), or None as the gain is.
        eps: Its eps.
        weight1: Weight of the first linear map, (hidden, D).
        bias1: Its bias, (hidden,), or None.
        weight2: Weight of the second linear map, (D, hidden).
        bias2: Its bias, (D,), or None.
        drop: Dropout rate, in training.
    """
    weight1, weight2 = cast(weight1, x.dtype), cast(weight2, x.dtype)
    norm_weight, norm_bias, bias1, bias2 = (
        None if t is None else cast(t, x.dtype) for t in (norm_weight, norm_bias, bias1, bias2))
    if keeps_less(x):
        y = _NormLinear.apply(x, norm_weight, norm_bias, eps, weight1, bias1)
    else:
        y = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps), weight1, bias1)
    return add_dropout(x, gelu_linear(y, weight2, bias2), drop)


class _NormLinear(torch.autograd.Function):
    """`linear(layer_norm(x))`, which keeps x and the statistics of its tokens, not what the linear map reads."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, eps, weight, bias):
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, mean, rstd, norm_weight, norm_bias, weight)
        return F.linear(y, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, mean, rstd, norm_weight, norm_bias, weight = ctx.saved_tensors
        of_norm = torch.ops.aten.native_layer_norm_backward(
            grad @ weight, x, x.shape[-1:], mean, rstd, norm_weight, norm_bias, ctx.needs_input_grad[:3])
        y = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, ctx.eps)
        return *of_norm, None, *_linear_gradients(grad, y, *ctx.needs_input_grad[4:])
