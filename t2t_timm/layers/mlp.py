"""The MLP of blocks and token layers: timm's, which keeps less for its gradient and takes the faster product."""
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Mlp as TimmMlp

from .observe import in_autocast, is_observed, is_plain, is_traced

__all__ = ['Mlp', 'gelu_linear', 'is_gelu_linear', 'pointwise']

# from how many tokens and weights on a product is faster as a convolution, where torch has MKL for the one and oneDNN
# for the other
MIN_TOKENS = 1024
MIN_WEIGHTS = 2 ** 15
HAS_BOTH = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def pointwise(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """Return `linear(x)`, on a CPU as the convolution of kernel size 1 that it is, where that is faster.

    On x86 torch multiplies float32 matrices by MKL and convolves by oneDNN, whose products of large matrices are the
    faster ones on AMD's cores, by 5 to 15 % (docs/speed.md); of small ones not, since the weights are laid out anew.

    Args:
        x: Tokens of shape (..., N, C).
        weight: Weight of the linear map, (D, C).
        bias: Its bias, (D,), or None.

    Returns:
        Tokens of shape (..., N, D).
    """
    if _convolves(x, weight):
        return _as_tokens(F.conv2d(_as_map(x), _as_kernel(weight), bias), x)
    return F.linear(x, weight, bias)


def _convolves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        HAS_BOTH
        and x.dtype == torch.float32
        and x.device.type == 'cpu'
        and x.numel() >= MIN_TOKENS * x.shape[-1]
        and weight.numel() >= MIN_WEIGHTS
        and not in_autocast(x)
    )


def _as_map(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, 1, *x.shape[-2:]).permute(0, 3, 1, 2)  # (B, C, 1, N), channels last


def _as_kernel(weight: torch.Tensor) -> torch.Tensor:
    return weight[:, :, None, None]


def _as_tokens(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).reshape(*like.shape[:-1], x.shape[1])


def gelu_linear(x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor]) -> torch.Tensor:
    """Return `linear(gelu(x))`, which keeps x for its gradient and makes gelu(x) again.

    The activation is the widest tensor of a block, as wide as x, and the cheapest to make: a hundredth of the block.

    Args:
        x: Hidden tokens of shape (B, N, hidden).
        weight: Weight of the linear map, (D, hidden).
        bias: Its bias, (D,), or None.

    Returns:
        Tokens of shape (B, N, D).
    """
    if in_autocast(x) and x.dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    if torch.is_grad_enabled() and x.requires_grad:
        return _GeluLinear.apply(x, weight, bias)
    return pointwise(F.gelu(x), weight, bias)


class _GeluLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias):
        return pointwise(F.gelu(x), weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        y = F.gelu(x)
        if _convolves(x, weight):
            grad_y, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
                _as_map(grad), _as_map(y), _as_kernel(weight), [len(weight)], [1, 1], [0, 0], [1, 1], False, [0, 0], 1,
                ctx.needs_input_grad)
            grad_y = _as_tokens(grad_y, y)
            grad_weight = None if grad_weight is None else grad_weight.flatten(1)
        else:
            grad_y, tokens = grad @ weight, grad.flatten(0, -2)
            grad_weight = tokens.t() @ y.flatten(0, -2) if ctx.needs_input_grad[1] else None
            grad_bias = tokens.sum(dim=0) if ctx.needs_input_grad[2] else None
        return torch.ops.aten.gelu_backward(grad_y, x), grad_weight, grad_bias


@torch.jit.unused
def is_gelu_linear(x: torch.Tensor, act: nn.Module, linear: nn.Module, *between: nn.Module) -> bool:
    """Return True if `gelu_linear(x)` may stand for `linear(act(x))`, with modules between that do nothing."""
    return (
        not is_traced(x)
        and type(act) is nn.GELU
        and act.approximate == 'none'
        and is_plain(linear)
        and not is_observed(act, *between)
        and all(type(m) is nn.Identity or type(m) is nn.Dropout and not (m.training and m.p > 0.) for m in between)
    )


class Mlp(TimmMlp):
    """timm's MLP by `pointwise` and `gelu_linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, N, C) to (B, N, C)."""
        if not torch.jit.is_scripting():
            if is_gelu_linear(x, self.act, self.fc2, self.drop1, self.norm) and is_plain(self.fc1):
                x = pointwise(x, self.fc1.weight, self.fc1.bias)
                return self.drop2(gelu_linear(x, self.fc2.weight, self.fc2.bias))
        x = self.drop1(self.act(self.fc1(x)))
        return self.drop2(self.fc2(self.norm(x)))
