"""The MLP of the token layers, in the dtype of its tokens."""
import torch
import torch.nn as nn
import torch.nn.functional as F

from .execution import autocast_off, params


@autocast_off
def mlp_skip(x: torch.Tensor, norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear, drop: float = 0.) -> torch.Tensor:
    """Return `x + dropout(fc2(gelu(fc1(norm(x)))))` of tokens x, (B, N, D), in the dtype of x throughout.

    `drop` is the dropout rate: 0 unless in training.
    """
    y = F.layer_norm(x, norm.normalized_shape, *params(norm, x.dtype), norm.eps)
    y = F.linear(F.gelu(F.linear(y, *params(fc1, x.dtype))), *params(fc2, x.dtype))
    return x + (F.dropout(y, drop) if drop > 0. else y)
