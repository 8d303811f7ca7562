"""How a fused operation is executed: traced, compiled or eager, in which dtype, and in chunks of a batch."""
import math
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _detect_infra_mode

T = TypeVar('T')

# Before torch 2.7, compiling and exporting cannot be told apart.
is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)

# make_fx records under the first; AOTAutograd has run the operations once before, under the second alone.
TRACING_MODES = torch._C._TorchDispatchModeKey.PROXY, torch._C._TorchDispatchModeKey.FUNCTIONAL
TOKENS_PER_THREAD = 2 ** 13


def is_traced() -> bool:
    """Return True if operations are traced or transformed, and must therefore be plain and differentiable.

    Exported and traced graphs run elsewhere, with or without gradients; torch.func and forward-mode derivatives
    transform each operation.
    """
    if torch.compiler.is_compiling():
        return is_exporting()
    return (
        torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or any(_detect_infra_mode(mode) is not None for mode in TRACING_MODES)
    )


def is_compiled() -> bool:
    """Return True if operations are compiled or traced: the compiler or runtime decides how they are executed."""
    return torch.compiler.is_compiling() or is_traced()


def autocast_off(fn: Callable[..., T]) -> Callable[..., T]:
    """Decorate an operation that chooses its dtypes itself: autocast is off in it. Its first argument is a tensor."""
    @wraps(fn)
    def run(x, *args, **kwargs):
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # autocast does not know the meta device
            return fn(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return fn(x, *args, **kwargs)
    return run


def cast(x: Any, dtype: torch.dtype) -> Any:
    """Return x, a tensor or None, in a dtype. Skips casts that change nothing, so that traced graphs stay small."""
    return x if x is None or x.dtype == dtype else x.to(dtype)


def wide_dtype(x: torch.Tensor) -> torch.dtype:
    """Return float64 if x is in float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def params(module: nn.Linear | nn.LayerNorm, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return weight and bias of a linear map or a LayerNorm in a dtype, None for what it lacks."""
    return cast(module.weight, dtype), cast(module.bias, dtype)


def square_sum(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the sum of squares of x along an axis, which is kept, in float32 or wider."""
    if x.device.type == 'cpu' or torch.is_grad_enabled() and x.requires_grad:
        x = cast(x, wide_dtype(x))
        return (x * x).sum(dim=dim, keepdim=True)
    # One pass: the square of a whole map is neither written nor read. A CPU has no fast norm over channels.
    return torch.linalg.vector_norm(x, dim=dim, keepdim=True, dtype=wide_dtype(x)).square_()


def in_chunks(fn: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return `fn(x)` of a batch x; a CPU computes a chunk of the batch at a time, which stays in its caches.

    Args:
        fn: Function that treats each image alone.
        x: Images or maps, (B, C, H, W).
        num_tokens: How many tokens fn makes of each.
    """
    if x.device.type != 'cpu' or is_compiled():
        return fn(x)
    num_chunks = math.ceil(x.shape[0] * num_tokens / (TOKENS_PER_THREAD * torch.get_num_threads()))
    return fn(x) if num_chunks < 2 else torch.cat([fn(chunk) for chunk in x.chunk(num_chunks)])
