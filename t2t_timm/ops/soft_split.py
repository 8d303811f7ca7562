"""Soft split, LayerNorm and linear map in fewer steps (paper section 3.1, equation 3).

With u a patch of n values, m and s^2 their mean and variance, g and b the LayerNorm's gain and bias, W and c the linear
map's weight and bias, and r any constant,

    W (g (u - m 1) / sqrt(s^2 + eps) + b) + c  =  F (u - r 1) / sqrt(s^2 + eps) + (W b + c),    F = W G - W G 1 1' / n

since the rows of F sum to zero. There are two exact ways: one for images, one for maps of many channels.

Images (`_norm_patches`). Where an image is flat, 1 / sqrt(s^2 + eps) reaches 316 and multiplies every rounding error
before it, so u - r must be as small as the patch's own deviation. Let r be the patch's centre pixel, its mean over the
channels: the difference of nearly equal numbers is exact, and nothing cancels afterwards. The patches are a view of the
padded image, which is written once, minus r, and then normalized. The linear map is W G with bias W b + c, so that the
gradient of the parameters needs no gradient of the patches.

Maps of many channels (`_convolve_normed`). Their channels differ, so that s^2 is not small beside m^2: r = 0, and F u
is a convolution. The patches, k^2 / stride^2 times the size of the map, are never written.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from .execution import autocast_off, cast, is_compiled, is_traced, params, square_sum, wide_dtype

MANY_CHANNELS = 32  # an image has fewer, or is split by a kernel that is wider than that of maps
MAP_KERNEL_SIZE = 3


def view_patches(x: torch.Tensor, kernel_size: int, stride: int, padding: int) -> torch.Tensor:
    """Return the patches of a map, (B, C, H, W), as a view of the padded map, (B, H', W', C, k, k)."""
    # F.unfold would launch once per image on a GPU, and leave a layout that a LayerNorm has to copy.
    x = F.pad(x, (padding, padding, padding, padding))
    return x.unfold(2, kernel_size, stride).unfold(3, kernel_size, stride).permute(0, 2, 3, 1, 4, 5)


def soft_split_linear(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        split: tuple[int, int, int],
) -> torch.Tensor:
    """Return `linear(soft_split(x))`, a map (B, D, H', W'), of a map x, (B, C, H, W), by one convolution.

    The linear map has weight (D, C * kernel_size ** 2) and bias (D,) or None; `split` is the kernel size, stride and
    padding of the soft split, in pixels.
    """
    kernel_size, stride, padding = split
    weight = weight.unflatten(1, (-1, kernel_size, kernel_size))
    if not is_compiled():  # then the result is a view of tokens (B, H' * W', D)
        weight = weight.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, bias, stride=stride, padding=padding)


def _fold_affine(norm_weight, norm_bias, weight, bias):
    """Return W G, (D, n), and W b + c, (D,); g and b, or c, may be None."""
    if norm_weight is None:
        return weight, weight.new_zeros(len(weight)) if bias is None else bias
    return weight * norm_weight, F.linear(norm_bias[None], weight, bias)[0]


def soft_split_norm_linear(
        x: torch.Tensor,
        norm: nn.LayerNorm,
        linear: nn.Linear,
        split: tuple[int, int, int],
) -> torch.Tensor:
    """Return `linear(norm(soft_split(x)))`, tokens (B, H' * W', D), of a map x, (B, C, H, W).

    `split` is the kernel size, stride and padding of the soft split, in pixels. The statistics of the norm are in
    float32 or wider; the tokens are in autocast's dtype where that is on, else in that of x.
    """
    is_image = x.shape[1] < MANY_CHANNELS or split[0] > MAP_KERNEL_SIZE
    dtype = x.dtype
    if not x.is_meta and dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    return (_norm_patches if is_image else _convolve_normed)(x, dtype, norm, linear, split)


@autocast_off
def _norm_patches(x, dtype, norm, linear, split):
    wide = wide_dtype(x)
    weight, bias = _fold_affine(*params(norm, wide), *params(linear, wide))
    if is_compiled():
        u = _blocked_patches(x, *split)
        weight = weight.unflatten(1, (-1, split[0], split[0])).permute(0, 3, 2, 1).flatten(1)
    else:
        u = _viewed_patches(x, dtype, *split)
    u = F.layer_norm(u, norm.normalized_shape, eps=norm.eps)
    return F.linear(cast(u, dtype), cast(weight, dtype), cast(bias, dtype))


def _blocked_patches(x, kernel_size, stride, padding):
    """Return u - r, (B, N, n), with the values of a patch in the order (column, row, channel), from whole blocks."""
    C = x.shape[1]
    starts = range(0, kernel_size, stride)  # of the blocks that a patch reads along an axis, the last one in part
    # Written so that torch.export sees that blocks divide the padded map, of any size.
    below, right = (
        (size + 2 * padding - kernel_size + len(starts) * stride) // stride * stride - padding - size
        for size in x.shape[2:])
    x = F.pad(x, (padding, right, padding, below))
    width = x.shape[3]
    for axis in (1, 2):  # rows of (B, H, C, W), then columns of (B, H', W, kernel_size * C)
        # unflatten() would fix the batch size of a graph of torch's older ONNX exporter.
        x = x.reshape(*x.shape[:2], -1, width).transpose(axis, axis + 1)
        inner = math.prod(x.shape[axis + 1:])
        x = x.reshape(*x.shape[:axis], -1, stride * inner)
        num_patches = x.shape[axis] - len(starts) + 1
        x = torch.cat([
            x.narrow(axis, i, num_patches)[..., :min(stride, kernel_size - start) * inner]
            for i, start in enumerate(starts)
        ], dim=-1)
    centre = kernel_size // 2 * (kernel_size + 1) * C
    return (x - x[..., centre:centre + C].mean(dim=-1, keepdim=True)).flatten(1, 2)


def _viewed_patches(x, dtype, kernel_size, stride, padding):
    """Return u - r, (B, N, n), with the values in the order (channel, row, column), written once where possible."""
    patches = view_patches(x, kernel_size, stride, padding)
    centre = patches[..., kernel_size // 2, kernel_size // 2].mean(dim=-1)
    if torch.is_grad_enabled() and x.requires_grad:
        return patches.flatten(3).flatten(1, 2) - centre.flatten(1)[..., None]
    u = patches.new_empty(patches.shape, dtype=dtype)
    torch.sub(patches, centre[..., None, None, None], out=u)
    return u.flatten(3).flatten(1, 2)


@autocast_off
def _convolve_normed(x, dtype, norm, linear, split):
    eager = not is_compiled()
    wide = wide_dtype(x)
    weight, bias = _fold_affine(*params(norm, wide), *params(linear, wide))
    for _ in range(2):  # a second pass removes what rounding left of the mean
        weight = weight - weight.mean(dim=1, keepdim=True)
    if is_traced():
        variance = _centred_variance(x, *split)
    else:
        mean, mean_square = _patch_mean(_ChannelMoments.apply(x), *split).unsqueeze(-1).unbind(1)
        variance = mean_square - mean * mean
    rstd = torch.rsqrt(variance.clamp(min=0.) + norm.eps)
    x, weight, rstd, bias = (cast(t, dtype) for t in (x, weight, rstd, bias))
    y = soft_split_linear(x, weight, None, split).permute(0, 2, 3, 1)
    # addcmul reads and writes the map once; exporters do not know it
    y = (torch.addcmul(bias, y, rstd) if eager else y * rstd + bias).flatten(1, 2)
    # Attention reads tokens that are contiguous; clone(), since a compiler may drop contiguous().
    return y if eager else y.clone(memory_format=torch.contiguous_format)


def _patch_mean(x: torch.Tensor, kernel_size: int, stride: int, padding: int) -> torch.Tensor:
    """Return the mean of each patch and channel; the padding counts, as unfolded zeros count in the LayerNorm."""
    # Rows, then columns: pooling adds one value at a time, and k + k of them round less than k^2.
    x = F.avg_pool2d(x, (kernel_size, 1), (stride, 1), (padding, 0))
    return F.avg_pool2d(x, (1, kernel_size), (1, stride), (0, padding))


def _centred_variance(x, kernel_size, stride, padding):
    """Return the variance of each patch, (B, H', W', 1), for graphs that runtimes may convert to float16.

    There a mean of squares would not resolve a small variance beside a large mean. So each pixel is centred by itself,
    and what is left of the means by their own mean over the map, which the padding is then away from.
    """
    split = kernel_size, stride, padding
    mean = x.mean(dim=1, keepdim=True, dtype=wide_dtype(x))
    shift = mean.mean(dim=(2, 3), keepdim=True)
    within, rest = (x - mean).square().mean(dim=1, keepdim=True), mean - shift
    padded = 1. - _patch_mean(torch.ones_like(mean), *split)  # the share of a patch that is padding
    mean_square = _patch_mean(within + rest * rest, *split) + padded * shift * shift
    mean = _patch_mean(rest, *split) - padded * shift
    return (mean_square - mean * mean).permute(0, 2, 3, 1)


class _ChannelMoments(torch.autograd.Function):
    """Mean and mean square over the channels of a map (B, C, H, W), in float32 or wider, (B, 2, H, W).

    The gradient, (g1 + 2 x g2) / C, takes one pass where autograd takes five.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        mean_square = square_sum(x, 1) / x.shape[1]
        return torch.cat([x.mean(dim=1, keepdim=True, dtype=mean_square.dtype), mean_square], dim=1)

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        grad_mean, grad_square = (grad / x.shape[1]).to(x.dtype).split(1, dim=1)
        return torch.addcmul(grad_mean, x, grad_square, value=2.)
