"""Dropout added to a skip connection: torch's own on a GPU; on a CPU by draws that serve four elements at a time."""

import torch
import torch.nn.functional as F

from .gate import is_recorded

__all__ = ['add_dropout', 'dropout', 'dropout_backward']


def dropout(x: torch.Tensor, drop: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return dropout of x, and what `dropout_backward` needs: None for drop 0.

    On a CPU torch draws for one element at a time, on one thread, so that dropping out the map at stride 4 its way
    takes as long as the rest of the layer. There one 64-bit draw serves four elements, and drop is rounded to 2^-16.

    Args:
        x: Tensor of any shape.
        drop: Dropout rate.
    """
    if drop == 0.:
        return x, None
    if x.device.type != 'cpu':
        return torch.native_dropout(x, drop, True)
    draws = torch.randint(-2 ** 63, 2 ** 63 - 1, ((x.numel() + 3) // 4,))
    draws = draws.view(torch.int16)[:x.numel()].view(x.shape)
    return dropout_backward(x, draws, drop), draws


def dropout_backward(grad: torch.Tensor, mask: torch.Tensor | None, drop: float) -> torch.Tensor:
    """Return the gradient of dropout: grad times 0 or 1 / (1 - drop), as `mask` says."""
    if mask is None:
        return grad
    if mask.dtype == torch.bool:
        return torch.ops.aten.native_dropout_backward(grad, mask, 1 / (1 - drop) if drop < 1. else 0.)
    num_dropped = round(drop * 2 ** 16)  # of the 2^16 values of a draw
    factor = mask.to(torch.promote_types(grad.dtype, torch.float32)).sub_(num_dropped - 2 ** 15 - 1).clamp_(0., 1.)
    return (grad * factor.mul_(2 ** 16 / max(2 ** 16 - num_dropped, 1))).to(grad.dtype)


def add_dropout(x: torch.Tensor, y: torch.Tensor, drop: float) -> torch.Tensor:
    """Return `x + dropout(y)`."""
    if drop == 0.:
        return x + y
    if is_recorded():
        return x + F.dropout(y, drop)
    return _AddDropout.apply(x, y, drop)


class _AddDropout(torch.autograd.Function):
    """`add_dropout`, which keeps the draws alone: two bytes per element on a CPU, one elsewhere."""

    @staticmethod
    def forward(ctx, x, y, drop):
        y, mask = dropout(y, drop)
        ctx.drop = drop
        ctx.save_for_backward(mask)
        return x + y

    @staticmethod
    def backward(ctx, grad):
        mask, = ctx.saved_tensors
        return grad, dropout_backward(grad, mask, ctx.drop), None
