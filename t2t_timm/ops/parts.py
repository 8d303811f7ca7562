"""A batch in parts, so that what a module passes on stays in a CPU's caches."""
import math
from collections.abc import Callable

import torch

from .gate import is_compiled

__all__ = ['in_parts']

TOKENS_PER_THREAD = 2 ** 13  # of the map at stride 4


def in_parts(fn: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return `fn(x)` of images (B, C, H, W), on a CPU computed for a part of the batch at a time.

    Args:
        fn: Function that treats each image alone.
        x: Images.
    """
    if x.device.type != 'cpu' or is_compiled():
        return fn(x)
    num_tokens = x.shape[0] * (x.shape[2] // 4) * (x.shape[3] // 4)
    num_parts = math.ceil(num_tokens / (TOKENS_PER_THREAD * torch.get_num_threads()))
    return fn(x) if num_parts < 2 else torch.cat([fn(part) for part in x.chunk(num_parts)])
