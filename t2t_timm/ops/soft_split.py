"""Soft split, LayerNorm and linear map as one convolution, scaled per token (paper section 3.1, equation 3).

With u a patch of n values, m and s^2 their mean and variance, g and b the LayerNorm's gain and bias, W and c the linear
map's weight and bias, and r any constant,

    W (g (u - m 1) / sqrt(s^2 + eps) + b) + c  =  F (u - r 1) / sqrt(s^2 + eps) + (W b + c),    F = W G - W G 1 1' / n

since the rows of F sum to zero. F (u - r 1) is a convolution, so that the unfolded patches, k^2 / stride^2 times the
size of the map, never exist; what r is decides how exact it is.

Pixels (`_two_scale`). Where an image is flat, 1 / sqrt(s^2 + eps) reaches 316 and multiplies the rounding of
F (u - r 1), so u - r must be as small as the patch's own deviation. Cut the image into cells of stride x stride pixels,
so that a patch is one whole cell and the first k - stride pixels of its neighbours right, below and diagonal. The first
pixel of a cell lies in every patch that reads the cell: let a be its mean over the channels, d = x - a of the own cell,
and r = a of the whole cell. Then with e_j = a_j - r, over the three neighbours j,

    F (u - r 1) = F d + sum_j e_j F 1_j,    sum (u - r) = sum d + sum_j n_j e_j,
    sum (u - r)^2 = sum d^2 + sum_j e_j (2 sum_j d + n_j e_j)

1_j marks the n_j values of the patch in cell j. d and e are differences of values of the patch: nothing cancels, and
ten bits of them are enough (TF32, float16). The e_j are a channel of the image more, in pixels of the whole cell.

Maps of many channels (`_moments`). Their channels differ, so that s^2 is not small beside m^2: r = 0.
"""

import torch
import torch.nn.functional as F

from .gate import is_compiled
from .precision import autocast_off, cast, product_dtype, square_sum, wide_dtype, widen

__all__ = ['fold_norm_linear', 'soft_split_linear', 'soft_split_norm_linear']


def soft_split_linear(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
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
    return _convolve(x, weight, bias, not is_compiled(), kernel_size, stride, padding)


def fold_norm_linear(
        norm_weight: torch.Tensor | None,
        norm_bias: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold a LayerNorm's affine part and its centring into the linear map that follows it.

    Args:
        norm_weight: LayerNorm gain g, (n,), or None for ones.
        norm_bias: LayerNorm bias b, (n,), or None for zeros; only with a gain.
        weight: Weight W of the linear map, (D, n).
        bias: Its bias c, (D,), or None.

    Returns:
        Folded weight F, (D, n), its rows summing to zero, and folded bias W b + c, (D,).
    """
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    if norm_weight is not None and norm_bias is not None:
        weight, bias = weight * norm_weight, bias + torch.mv(weight, norm_bias)
    for _ in range(2):  # what rounding leaves of a mean is taken away by another
        weight = weight - weight.mean(dim=1, keepdim=True)
    return weight, bias


def soft_split_norm_linear(
        x: torch.Tensor,
        norm_weight: torch.Tensor | None,
        norm_bias: torch.Tensor | None,
        eps: float,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        kernel_size: int,
        stride: int,
        padding: int,
) -> torch.Tensor:
    """Return `linear(norm(soft_split(x)))`, the statistics of the norm in float32 or wider.

    Args:
        x: Map of shape (B, C, H, W).
        norm_weight: LayerNorm gain, (C * kernel_size ** 2,), or None for ones.
        norm_bias: LayerNorm bias, as long, or None with the gain.
        eps: The LayerNorm's eps.
        weight: Weight of the linear map, (D, C * kernel_size ** 2).
        bias: Its bias, (D,), or None.
        kernel_size: Side of a patch, in pixels.
        stride: Distance of neighbouring patches, in pixels.
        padding: Zeros added on each side, in pixels.

    Returns:
        Tokens of shape (B, H' * W', D), in autocast's dtype where that is on, else in that of x.
    """
    return _soft_split_norm_linear(
        x, product_dtype(x), norm_weight, norm_bias, eps, weight, bias, kernel_size, stride, padding)


@autocast_off
def _soft_split_norm_linear(x, dtype, norm_weight, norm_bias, eps, weight, bias, *split):
    eager = not is_compiled()
    weight, bias = fold_norm_linear(*(None if t is None else widen(t) for t in (norm_weight, norm_bias, weight, bias)))
    if _has_two_scales(*split):
        x, weight, mean, mean_square = _two_scale(x, weight, dtype, eager, *split)
        split = *split[:2], 0
    else:
        mean, mean_square = _moments(x, eager, *split)
    rstd = torch.rsqrt((mean_square - mean * mean).clamp(min=0.) + eps)
    x, weight, rstd, bias = (cast(t, dtype) for t in (x, weight, rstd, bias))
    y = _convolve(x, weight, None, eager, *split)
    tokens = _scale_and_shift(y, rstd, bias.view(-1, 1, 1), eager).flatten(2).transpose(1, 2)
    # whole in memory, as they are in eager mode, for attention; a graph may think that they are and drop contiguous()
    return tokens if eager else tokens.clone(memory_format=torch.contiguous_format)


def _convolve(x, weight, bias, eager, kernel_size, stride, padding):
    weight = weight.unflatten(1, (-1, kernel_size, kernel_size))
    if eager:  # so that the map that leaves is a view of its tokens (B, H' * W', D)
        weight = weight.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, bias, stride=stride, padding=padding)


def _scale_and_shift(y: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eager: bool) -> torch.Tensor:
    """Return `y * scale + shift`, of a y that nobody else holds: the largest map of the model."""
    if not eager:
        return y * scale + shift
    if y.device.type == 'cpu' and not scale.requires_grad:
        return y.mul_(scale).add_(shift)  # while it is in the cache; a GPU has none that large, one pass is better
    return torch.addcmul(shift, y, scale)


def _has_two_scales(kernel_size: int, stride: int, padding: int) -> bool:
    # a patch ends in the next cell, whose first pixel lies in the image or the patch reads padding, which varies;
    # at any size each row and column of patches has such a cell; the whole cell has 2 x 2 pixels for the differences
    return kernel_size - stride == padding + 1 <= stride - 1


def _two_scale(
        x: torch.Tensor,
        weight: torch.Tensor,
        dtype: torch.dtype,
        eager: bool,
        kernel_size: int,
        stride: int,
        padding: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return d and e in whole cells, F with the columns F 1_j, and mean and mean square of u - r.

    Args:
        x: Image of shape (B, C, H, W).
        weight: F, (D, C * kernel_size ** 2).
        dtype: Dtype of d and e.
        eager: Whether the operations run as they are called.
    """
    x, C = widen(x), weight.shape[1] // kernel_size ** 2
    a = _references(x, kernel_size, stride, padding)
    e = torch.cat([a[:, :, :-1, 1:], a[:, :, 1:, :-1], a[:, :, 1:, 1:]], dim=1) - a[:, :, :-1, :-1]
    d = _cells_of_differences(x, a, e, dtype, eager, stride, padding)

    whole, parts = _part_sums(d[:, :C].sum(dim=1, dtype=x.dtype), kernel_size, stride)
    side, corner = C * stride * (kernel_size - stride), C * (kernel_size - stride) ** 2
    n_e = torch.cat([side * e[:, :2], corner * e[:, 2:]], dim=1)  # n_j e_j
    sums = parts + n_e
    mean = (whole + sums.sum(dim=1, keepdim=True)) / weight.shape[1]
    square = _patch_mean(square_sum(d[:, :C], 1), kernel_size, stride, 0) / C
    mean_square = square + (e * (parts + sums)).sum(dim=1, keepdim=True) / weight.shape[1]
    weight = _with_parts(weight.unflatten(1, (-1, kernel_size, kernel_size)), stride)
    return d, weight.flatten(1), mean, mean_square


def _references(x: torch.Tensor, kernel_size: int, stride: int, padding: int) -> torch.Tensor:
    """Return a, the mean over the channels of each cell's first pixel, (B, 1, H' + 1, W' + 1).

    0 for cells with padding where patches read them: such a patch varies between the padding, 0, and its pixels.
    """
    first = stride - padding
    a = x[:, :, first:-padding:stride, first:-padding:stride].mean(dim=1, keepdim=True)  # where the part ends inside
    height, width = ((size + 2 * padding - kernel_size) // stride + 1 for size in x.shape[2:])
    return F.pad(a, (1, width - a.shape[3], 1, height - a.shape[2]))


def _cells_of_differences(
        x: torch.Tensor,
        a: torch.Tensor,
        e: torch.Tensor,
        dtype: torch.dtype,
        eager: bool,
        stride: int,
        padding: int,
) -> torch.Tensor:
    """Return d, padded to whole cells, and e in three pixels of each cell of a further channel.

    Of shape (B, C + 1, stride * (H' + 1), stride * (W' + 1)).
    """
    B, C, H, W = x.shape
    height, width = stride * a.shape[2], stride * a.shape[3]
    a = a.unsqueeze(4).expand(-1, -1, -1, -1, stride).flatten(3)
    a = a.unsqueeze(3).expand(-1, -1, -1, stride, -1).flatten(2, 3)  # a of its cell for each pixel
    if not eager or x.requires_grad:
        x = F.pad(x, (padding, width - padding - W, padding, height - padding - H))
        e = F.pad(e, (0, 1, 0, 1))
        zeros = torch.zeros_like(e[:, :1])
        e = torch.cat([e[:, :2], *[zeros] * (stride - 2), e[:, 2:], *[zeros] * (stride ** 2 - stride - 1)], dim=1)
        return torch.cat([x - a, F.pixel_shuffle(e, stride)], dim=1).to(dtype)
    layout = torch.contiguous_format if x.device.type == 'cpu' else torch.channels_last  # what convolutions read there
    d = torch.empty(B, C + 1, height, width, dtype=dtype, device=x.device, memory_format=layout)
    rows, columns = slice(padding, padding + H), slice(padding, padding + W)
    torch.sub(x, a[:, :, rows, columns], out=d[:, :C, rows, columns])
    for rest in (d[:, C], d[:, :, :padding], d[:, :, padding + H:], d[..., :padding], d[..., padding + W:]):
        rest.zero_()
    for i, (row, column) in enumerate(((0, 0), (0, 1), (1, 0))):
        d[:, C, row:height - stride:stride, column:width - stride:stride] = e[:, i]
    return d


def _part_sums(x: torch.Tensor, kernel_size: int, stride: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of x, (B, stride * (H' + 1), stride * (W' + 1)), over the parts of each patch.

    Not as a convolution, which adds all values one by one and, under TF32, rounds them.

    Returns:
        The whole cell's, (B, 1, H', W'), and those of its neighbours right, below and diagonal, (B, 3, H', W').
    """
    part = kernel_size - stride
    rows = [x[:, i::stride] for i in range(stride)]  # not by unflatten, which exported would fix the size
    upper = sum(rows[1:part], rows[0])
    columns = [[y[:, :, i::stride] for i in range(stride)] for y in (sum(rows[part:], upper), upper)]
    right, diagonal = (sum(y[1:part], y[0]) for y in columns)
    whole, below = sum(columns[0][part:], right), sum(columns[1][part:], diagonal)
    parts = torch.stack([right[:, :-1, 1:], below[:, 1:, :-1], diagonal[:, 1:, 1:]], dim=1)
    return whole[:, None, :-1, :-1], parts


def _with_parts(kernels: torch.Tensor, stride: int) -> torch.Tensor:
    """Return kernels (D, C, k, k) with a channel more, which has their sums over the three parts where e stands."""
    total = kernels.sum(dim=1)
    right, below = total[:, :stride, stride:].sum(dim=(1, 2)), total[:, stride:, :stride].sum(dim=(1, 2))
    diagonal = total[:, stride:, stride:].sum(dim=(1, 2))
    parts = torch.stack([right, below, diagonal, torch.zeros_like(right)], dim=1).view(-1, 1, 2, 2)
    after = kernels.shape[-1] - 2
    return torch.cat([kernels, F.pad(parts, (0, after, 0, after))], dim=1)


def _moments(x: torch.Tensor, eager: bool, *split: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and mean square of each patch of a map (B, C, H, W), two maps (B, 1, H', W')."""
    in_one_pass = eager and torch.is_grad_enabled() and x.requires_grad
    moments = _ChannelMoments.apply(x) if in_one_pass else _channel_moments(x)
    mean, mean_square = _patch_mean(moments, *split).unsqueeze(2).unbind(1)  # exported, split would fix the batch
    return mean, mean_square


def _patch_mean(x: torch.Tensor, kernel_size: int, stride: int, padding: int) -> torch.Tensor:
    """Return the mean of each patch and channel; the padding counts, as unfolded zeros count in the LayerNorm.

    Rows first: pooling adds one value at a time, so that k + k of them round less than k^2 do.
    """
    x = F.avg_pool2d(x, (kernel_size, 1), (stride, 1), (padding, 0))
    return F.avg_pool2d(x, (1, kernel_size), (1, stride), (0, padding))


def _channel_moments(x: torch.Tensor) -> torch.Tensor:
    """Return mean and mean square over the channels of a map (B, C, H, W), in float32 or wider, (B, 2, H, W)."""
    return torch.cat([x.mean(dim=1, keepdim=True, dtype=wide_dtype(x)), square_sum(x, 1) / x.shape[1]], dim=1)


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
