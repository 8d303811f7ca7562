"""In which dtype a fused operation computes: autocast's for its products, float32 or wider for its statistics."""
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .gate import is_compiled

__all__ = ['autocast_off', 'cast', 'product_dtype', 'square_sum', 'widen']


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype that products with x are computed in: autocast's, if it is on and changes x, else that of x."""
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def autocast_off(x: torch.Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast leaves x alone, so that an operation chooses its dtypes itself."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # autocast does not know the meta device
        return nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def cast(dtype: torch.dtype, *tensors: torch.Tensor | None) -> list[Any]:
    """Return the tensors in a dtype; None stays None, which types cannot tell."""
    return [None if t is None else t.to(dtype) for t in tensors]


def widen(x: torch.Tensor) -> torch.Tensor:
    """Return x in float32, or in float64 if it is."""
    return x if x.dtype == torch.float64 else x.float()


def square_sum(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the sum of squares of x along an axis, which is kept, in float32 or wider."""
    if x.device.type == 'cpu' or is_compiled() or torch.is_grad_enabled() and x.requires_grad:
        return widen(x).square().sum(dim=dim, keepdim=True)
    # one pass where the square of a whole map would be written and read again; a CPU has no fast norm over channels
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=dtype).square_()
