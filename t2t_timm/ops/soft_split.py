"""Soft split, LayerNorm and linear map as one convolution, scaled per token (paper section 3.1, equation 3).

With u a patch of n values, m and s^2 their mean and variance, g and b the LayerNorm's gain and bias, W and c the linear
map's weight and bias, and r any constant,

    W (g (u - m 1) / sqrt(s^2 + eps) + b) + c  =  F (u - r 1) / sqrt(s^2 + eps) + (W b + c),    F = W G - W G 1 1' / n

since the rows of F sum to zero. F (u - r 1) is a convolution, so that the unfolded patches, k^2 / stride^2 times the
size of the map, never exist; what r is decides how exact it is.

Pixels (`_two_scale`). Where an image is flat, 1 / sqrt(s^2 + eps) reaches 316 and multiplies the rounding of
F (u - r 1), so u - r must be as small as the patch's own deviation. Cut the image into cells of stride x stride pixels,
so that a patch is one whole cell and the first k - stride pixels of its neighbours right, below and diagonal. Their
corner of (k - stride)^2 pixels lies in every patch that reads the cell: let a be its mean, d = x - a of the own cell,
and r = a of the whole cell. Then with e_j = a_j - r, over the three neighbours j,

    F (u - r 1) = F d + sum_j e_j F 1_j,    sum (u - r) = sum d + sum_j n_j e_j,
    sum (u - r)^2 = sum d^2 + sum_j (2 e_j sum_j d + n_j e_j^2)

1_j marks the n_j values of the patch in cell j. d and e are differences of values of the patch: nothing cancels, and
ten bits of them are enough (TF32, float16). The e_j are a channel of the image more, in pixels of the whole cell.

Maps of many channels (`_moments`). Their channels differ, so that s^2 is not small beside m^2: r = 0.
"""
from typing import Optional, Tuple

import torch
import torch.nn.functional as F

from .gate import is_compiled, is_recorded
from .precision import autocast_off, cast, product_dtype, square_sum, widen

__all__ = ['fold_norm_linear', 'soft_split_linear', 'soft_split_norm_linear']


def soft_split_linear(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        kernel_size: int,
        stride: int,
        padding: int,
) -> torch.Tensor:
    """Return `linear(soft_split(x))` as the convolution it is.

    Args:
        x: Map of shape (B, C, H, W).
        weight: Weight of the linear map, (D, C * kernel_size ** 2).
        bias: Its bias, (D,), or None.
        kernel_size: Side of a patch, in pixels.
        stride: Distance of neighbouring patches, in pixels.
        padding: Zeros added on each side, in pixels.

    Returns:
        Map of shape (B, D, H', W').
    """
    weight = weight.reshape(weight.shape[0], x.shape[1], kernel_size, kernel_size)
    if not is_recorded():  # so that the map that leaves is a view of its tokens (B, H' * W', D)
        weight = weight.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, bias, stride=stride, padding=padding)


def fold_norm_linear(
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Fold a LayerNorm's affine part and its centring into the linear map that follows it.

    Args:
        norm_weight: LayerNorm gain g, (n,).
        norm_bias: LayerNorm bias b, (n,).
        weight: Weight W of the linear map, (D, n).
        bias: Its bias c, (D,), or None.

    Returns:
        Folded weight F, (D, n), its rows summing to zero, and folded bias W b + c, (D,).
    """
    folded = weight * norm_weight
    folded_bias = torch.mv(weight, norm_bias)
    return folded - folded.mean(dim=1, keepdim=True), folded_bias if bias is None else folded_bias + bias


def soft_split_norm_linear(
        x: torch.Tensor,
        norm_weight: Optional[torch.Tensor],
        norm_bias: Optional[torch.Tensor],
        eps: float,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        kernel_size: int,
        stride: int,
        padding: int,
) -> torch.Tensor:
    """Return `linear(norm(soft_split(x)))`, the statistics of the norm in float32 or wider.

    Args:
        x: Map of shape (B, C, H, W).
        norm_weight: LayerNorm gain, (C * kernel_size ** 2,), or None if it is folded into the weight already.
        norm_bias: LayerNorm bias, as long, or None.
        eps: The LayerNorm's eps.
        weight: Weight of the linear map, (D, C * kernel_size ** 2).
        bias: Its bias, (D,), or None.
        kernel_size: Side of a patch, in pixels.
        stride: Distance of neighbouring patches, in pixels.
        padding: Zeros added on each side, in pixels.

    Returns:
        Tokens of shape (B, H' * W', D), in autocast's dtype where that is on, else in that of x.
    """
    dtype = product_dtype(x)
    with autocast_off(x):
        if norm_weight is not None:
            weight, bias = fold_norm_linear(*cast(widen(weight).dtype, norm_weight, norm_bias, weight, bias))
        if _has_two_scales(kernel_size, stride, padding):
            x, weight, mean, mean_square = _two_scale(x, weight, dtype, kernel_size, stride, padding)
        else:
            mean, mean_square = _moments(x, kernel_size, stride, padding)
        rstd = torch.rsqrt((mean_square - mean * mean).clamp(min=0.) + eps)
        x, weight, rstd, bias = cast(dtype, x, weight, rstd, bias)
        y = soft_split_linear(x, weight, None, kernel_size, stride, padding)
        return _scale_and_shift(y, rstd, bias.view(-1, 1, 1)).flatten(2).transpose(1, 2)


def _scale_and_shift(y: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Return `y * scale + shift`, of a y that nobody else holds: the largest map of the model."""
    if is_compiled():
        return y * scale + shift
    if y.device.type == 'cpu' and not scale.requires_grad:
        return y.mul_(scale).add_(shift)  # while it is in the cache; a GPU has none that large, one pass is better
    return torch.addcmul(shift, y, scale)


def _has_two_scales(kernel_size: int, stride: int, padding: int) -> bool:
    # a patch ends in the next cell, whose corner lies in the image or the patch reads padding, which varies enough;
    # the whole cell has 2 x 2 pixels in the image for the differences
    return 0 < kernel_size - stride <= padding + 1 <= stride - 1 and padding <= kernel_size - stride


def _references(x: torch.Tensor, height: int, width: int, kernel_size: int, stride: int, padding: int) -> torch.Tensor:
    """Return a, the mean of each cell's corner over pixels and channels, (B, 1, height + 1, width + 1).

    0 for cells with padding in their corner: every patch that reads them varies between it and its pixels.
    """
    corner, first = kernel_size - stride, stride - padding
    rows, columns = ((size - first - corner) // stride + 1 for size in x.shape[2:])
    if rows < 1 or columns < 1:
        return x.new_zeros(x.shape[0], 1, height + 1, width + 1)
    a = F.avg_pool2d(x[:, :, first:, first:], corner, stride).mean(dim=1, keepdim=True)
    return F.pad(a, (1, width - columns, 1, height - rows))


def _two_scale(
        x: torch.Tensor,
        weight: torch.Tensor,
        dtype: torch.dtype,
        kernel_size: int,
        stride: int,
        padding: int,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return d with e as its last channel, F with the columns F 1_j, and mean and mean square of u - r.

    Args:
        x: Image of shape (B, C, H, W).
        weight: F, (D, C * kernel_size ** 2).
        dtype: Dtype of d and e.
    """
    B, C, H, W = x.shape
    height, width = ((size + 2 * padding - kernel_size) // stride + 1 for size in (H, W))
    x = widen(x)
    a = _references(x, height, width, kernel_size, stride, padding)
    whole = a[:, :, :-1, :-1]
    e = torch.cat([a[:, :, :-1, 1:], a[:, :, 1:, :-1], a[:, :, 1:, 1:]], dim=1) - whole  # right, below, diagonal

    a = F.interpolate(a, scale_factor=stride)[:, :, padding:padding + H, padding:padding + W]
    between, after = stride - 2, stride ** 2 - stride - 1  # the first two pixels of a cell's row, the first of the next
    e_pixels = F.pixel_shuffle(torch.cat([
        e[:, :2], e.new_zeros(B, between, height, width), e[:, 2:], e.new_zeros(B, after, height, width)], 1), stride)
    e_pixels = F.pad(e_pixels, (0, W - stride * width, 0, H - stride * height))
    d = torch.cat([x - a, e_pixels], dim=1).to(dtype)

    weight = weight.reshape(-1, C, kernel_size, kernel_size)
    parts = _parts(weight, kernel_size, stride)
    weight = torch.cat([weight, _at_pixels(parts.sum(dim=(2, 3, 4)), kernel_size, padding)], dim=1)
    ones = _parts(weight.new_ones(1, C, kernel_size, kernel_size), kernel_size, stride)[0]  # 1_j, (3, C, k, k)
    counts = ones.sum(dim=(1, 2, 3))
    sums = torch.cat([ones.new_ones(1, C, kernel_size, kernel_size), ones])
    at_pixels = _at_pixels(torch.cat([counts[None], counts.new_zeros(3, 3)]), kernel_size, padding)
    sums = F.conv2d(d, torch.cat([sums, at_pixels], dim=1).to(dtype), stride=stride, padding=padding)
    sums = widen(sums)

    n = C * kernel_size ** 2
    squares = kernel_size ** 2 * F.avg_pool2d(square_sum(d[:, :C], 1), kernel_size, stride, padding)
    squares = squares + (e * (2 * sums[:, 1:] + counts.view(-1, 1, 1) * e)).sum(dim=1, keepdim=True)
    return d, weight.flatten(1), sums[:, :1] / n, squares / n


def _parts(weight: torch.Tensor, kernel_size: int, stride: int) -> torch.Tensor:
    """Return a kernel (D, C, k, k) cut to the parts right, below and diagonal, (D, 3, C, k, k)."""
    inside = torch.arange(kernel_size, device=weight.device) < stride
    rows, columns = inside[:, None], inside
    return weight.unsqueeze(1) * torch.stack([rows & ~columns, ~rows & columns, ~rows & ~columns]).unsqueeze(1)


def _at_pixels(values: torch.Tensor, kernel_size: int, padding: int) -> torch.Tensor:
    """Return values (D, 3) at the pixels of a kernel where the differences stand, (D, 1, k, k)."""
    after = kernel_size - padding - 2
    return F.pad(F.pad(values, (0, 1)).view(-1, 1, 2, 2), (padding, after, padding, after))


def _moments(x: torch.Tensor, kernel_size: int, stride: int, padding: int) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return mean and mean square of each patch of a map (B, C, H, W), two maps (B, 1, H', W')."""
    if is_compiled() or not (torch.is_grad_enabled() and x.requires_grad):
        moments = _channel_moments(x)
    else:
        moments = _ChannelMoments.apply(x)
    # the padding counts, as unfolded zeros count in the LayerNorm
    mean, mean_square = F.avg_pool2d(moments, kernel_size, stride, padding).split(1, dim=1)
    return mean, mean_square


def _channel_moments(x: torch.Tensor) -> torch.Tensor:
    """Return mean and mean square over the channels of a map (B, C, H, W), in float32 or wider, (B, 2, H, W)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.cat([x.mean(dim=1, keepdim=True, dtype=dtype), square_sum(x, 1) / x.shape[1]], dim=1)


class _ChannelMoments(torch.autograd.Function):
    """`_channel_moments` with its gradient, (g1 + 2 x g2) / C, in one pass where autograd takes five."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _channel_moments(x)

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        grad_mean, grad_square = (grad / x.shape[1]).to(x.dtype).split(1, dim=1)
        return torch.addcmul(grad_mean, x, grad_square, value=2.)
