"""The MLP of blocks and token layers: timm's, which keeps less for its gradient."""
from typing import Optional

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Mlp as TimmMlp

from .observe import in_autocast, is_observed, is_plain, is_traced

__all__ = ['Mlp', 'gelu_linear', 'keeps_less']


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
    return _GeluLinear.apply(x, weight, bias)


@torch.jit.unused
def keeps_less(x: torch.Tensor, act: nn.Module, linear: nn.Module, *between: nn.Module) -> bool:
    """Return True if `gelu_linear(x)` may stand for `linear(act(x))`, with modules between that do nothing."""
    return (
        torch.is_grad_enabled()
        and not is_traced(x)
        and x.requires_grad
        and type(act) is nn.GELU
        and act.approximate == 'none'
        and is_plain(linear)
        and not is_observed(act, *between)
        and all(type(m) is nn.Identity or type(m) is nn.Dropout and not (m.training and m.p > 0.) for m in between)
    )


class _GeluLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias):
        return F.linear(F.gelu(x), weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        tokens = grad.flatten(0, -2)
        wanted = ctx.needs_input_grad
        return (
            torch.ops.aten.gelu_backward(grad @ weight, x) if wanted[0] else None,
            tokens.t() @ F.gelu(x).flatten(0, -2) if wanted[1] else None,
            tokens.sum(dim=0) if wanted[2] else None,
        )


class Mlp(TimmMlp):
    """timm's MLP, which in a step with gradients keeps the input of its activation and not the output as well."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, N, C) to (B, N, C)."""
        x = self.fc1(x)
        if not torch.jit.is_scripting():
            if keeps_less(x, self.act, self.fc2, self.drop1, self.norm):
                return self.drop2(gelu_linear(x, self.fc2.weight, self.fc2.bias))
        x = self.drop1(self.act(x))
        return self.drop2(self.fc2(self.norm(x)))
