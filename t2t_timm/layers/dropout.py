"""Dropout that a CPU draws fast, and of which a step with gradients keeps two bytes an element."""
from typing import Optional

import torch

from .observe import is_traced

__all__ = ['add_dropout', 'draw_dropout', 'dropout_factor']


def draw_dropout(x: torch.Tensor, drop: float) -> Optional[torch.Tensor]:
    """Return random 16-bit integers of the shape of x, or None for drop 0.

    On a CPU torch draws for one element at a time, on one thread, so that dropping out the map at stride 4 its way
    takes as long as the rest of the layer: here one 64-bit draw serves four elements.

    Args:
        x: Tensor of the shape and on the device wanted.
        drop: Dropout rate.
    """
    if drop == 0.:
        return None
    if x.device.type != 'cpu':
        return torch.randint(-2 ** 15, 2 ** 15, x.shape, dtype=torch.int16, device=x.device)
    draws = torch.randint(-2 ** 63, 2 ** 63 - 1, ((x.numel() + 3) // 4,))
    return draws.view(torch.int16)[:x.numel()].view(x.shape)


def dropout_factor(draws: torch.Tensor, drop: float, dtype: torch.dtype) -> torch.Tensor:
    """Return what dropout multiplies by, 0 or 1 / (1 - drop), drop rounded to 2^-16.

    Args:
        draws: What `draw_dropout` gave.
        drop: Dropout rate.
        dtype: float32 or float64.
    """
    num_dropped = round(drop * 2 ** 16)  # of the 2^16 values of a draw
    keep = draws.to(dtype).sub_(num_dropped - 2 ** 15 - 1).clamp_(0., 1.)
    return keep.mul_(2 ** 16 / max(2 ** 16 - num_dropped, 1))


def add_dropout(x: torch.Tensor, y: torch.Tensor, drop: float) -> torch.Tensor:
    """Return `x + dropout(y)`, drop rounded to 2^-16."""
    draws = draw_dropout(y, drop)
    if draws is None:
        return x + y
    if is_traced(x):
        return x + y * dropout_factor(draws, drop, torch.promote_types(y.dtype, torch.float32)).to(y.dtype)
    return _AddDropout.apply(x, y, draws, drop)


class _AddDropout(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, y, draws, drop):
        factor = dropout_factor(draws, drop, torch.promote_types(y.dtype, torch.float32))
        out = torch.addcmul(x.to(factor.dtype), y.to(factor.dtype), factor)
        return out.to(torch.promote_types(x.dtype, y.dtype))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, draws, ctx.drop = inputs
        ctx.save_for_backward(draws)
        ctx.dtypes = x.dtype, y.dtype

    @staticmethod
    def backward(ctx, grad):
        draws, = ctx.saved_tensors
        factor = dropout_factor(draws, ctx.drop, torch.promote_types(grad.dtype, torch.float32))
        return grad.to(ctx.dtypes[0]), (grad * factor).to(ctx.dtypes[1]), None, None
