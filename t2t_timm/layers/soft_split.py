"""Soft split (paper section 3.1, equation 3): overlapping patches of a map, unfolded into tokens."""
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from .. import ops

__all__ = ['SOFT_SPLITS', 'fold_modules', 'soft_split', 'soft_split_size', 'tokens_to_map']

SOFT_SPLITS = ((7, 4, 2), (3, 2, 1), (3, 2, 1))  # kernel size, stride and padding of each, in pixels


def soft_split_size(size: int, kernel_size: int, stride: int, padding: int) -> int:
    """Return how many tokens a soft split makes along an axis of `size` pixels: what a convolution gives."""
    return (size + 2 * padding - kernel_size) // stride + 1


def soft_split(x: torch.Tensor, kernel_size: int, stride: int, padding: int) -> torch.Tensor:
    """Unfold overlapping patches of a map into tokens (paper equation 3).

    Args:
        x: Map of shape (B, C, H, W).
        kernel_size: Side of a patch, in pixels.
        stride: Distance of neighbouring patches, in pixels.
        padding: Zeros added on each side, in pixels.

    Returns:
        Tokens of shape (B, H' * W', C * kernel_size ** 2), channel-major within a token.
    """
    return F.unfold(x, kernel_size, padding=padding, stride=stride).transpose(1, 2)


def tokens_to_map(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return tokens (B, height * width, D) as a map (B, D, height, width), a view."""
    # unflatten() would fix the batch size of a graph of torch's older ONNX exporter.
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], height, width)


@torch.no_grad()
def fold_modules(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[nn.LayerNorm, nn.Linear]:
    """Return a LayerNorm without gain and bias, and the linear map that `fold_norm_linear` makes for it.

    Modules that are folded already are returned as they are.
    """
    if norm.weight is None:
        return norm, linear
    dd: dict[str, Any] = {'device': linear.weight.device, 'dtype': linear.weight.dtype}
    folded = nn.Linear(linear.in_features, linear.out_features, **dd)
    # Fold once in float64, on the CPU, since some devices have no float64.
    tensors = (norm.weight, norm.bias, linear.weight, linear.bias)
    weight, bias = ops.fold_norm_linear(*(None if t is None else t.cpu().double() for t in tensors))
    folded.weight.copy_(weight)
    folded.bias.copy_(bias)
    folded.requires_grad_(linear.weight.requires_grad)
    plain = nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False, **dd)
    return plain.train(norm.training), folded.train(linear.training)
