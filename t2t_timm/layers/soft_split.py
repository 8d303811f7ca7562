"""Soft split (paper section 3.1, equation 3): overlapping patches of a map, unfolded into tokens."""
import torch
import torch.nn.functional as F

from ..ops import view_patches

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
    if torch.jit.is_tracing():  # torch's older ONNX exporter has no views of patches where sizes are free
        return F.unfold(x, kernel_size, padding=padding, stride=stride).transpose(1, 2)
    return view_patches(x, kernel_size, stride, padding).flatten(3).flatten(1, 2)


def tokens_to_map(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return tokens (B, height * width, D) as a map (B, D, height, width), a view."""
    # unflatten() would fix the batch size of a graph of torch's older ONNX exporter.
    return x.reshape(x.shape[0], height, width, x.shape[2]).permute(0, 3, 1, 2)
