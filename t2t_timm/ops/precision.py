"""In which dtype a fused operation computes: autocast's for its products, float32 or wider for its statistics."""
from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch

__all__ = ['autocast_off', 'cast', 'product_dtype', 'square_sum', 'wide_dtype', 'widen']

T = TypeVar('T')


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the dtype that products with x are computed in: autocast's, if it is on and changes x, else that of x."""
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return x.dtype
    return torch.get_autocast_dtype(x.device.type)


def autocast_off(fn: Callable[..., T]) -> Callable[..., T]:
    """Decorate an operation, a tensor its first argument: autocast leaves it alone, it chooses its dtypes itself."""
    @wraps(fn)
    def run(x, *args, **kwargs):
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # autocast does not know the meta device
            return fn(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return fn(x, *args, **kwargs)
    return run


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return x in a dtype; a graph that is recorded gets no node for nothing."""
    return x if x.dtype == dtype else x.to(dtype)


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """Return float32, or float64 if x is in that."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widen(x: torch.Tensor) -> torch.Tensor:
    """Return x in float32, or in float64 if it is."""
    return cast(x, wide_dtype(x))


def square_sum(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the sum of squares of x along an axis, which is kept, in float32 or wider."""
    if x.device.type == 'cpu' or torch.is_grad_enabled() and x.requires_grad:
        return widen(x).square().sum(dim=dim, keepdim=True)
    # one pass where the square of a whole map would be written and read again; a CPU has no fast norm over channels
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide_dtype(x)).square_()
