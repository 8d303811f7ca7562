"""Soft split (paper section 3.1, equation 3): overlapping patches of a map, unfolded into tokens.

A soft split is always followed by a linear map here, with or without a LayerNorm between the two. Both pairs are
convolutions, so the unfolded tensor, k * k / stride^2 times the size of the map, never has to exist.
"""
from typing import Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import register_notrace_function

from .observe import in_autocast, is_traced

__all__ = [
    'SOFT_SPLITS', 'fold_modules', 'fold_norm_linear', 'soft_split', 'soft_split_folded_linear',
    'soft_split_linear', 'soft_split_norm_linear', 'soft_split_size', 'tokens_to_map',
]

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


@torch.fx.wrap
@register_notrace_function
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
    # channels last, so that the map that leaves is a view of its tokens (B, H' * W', D)
    weight = weight.contiguous(memory_format=torch.channels_last)
    return F.conv2d(x, weight, bias, stride=stride, padding=padding)


def fold_norm_linear(
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Fold a LayerNorm's affine part and its centring into the linear map that follows it.

    With a patch u of n values, its mean m = 1'u / n and s = (var(u) + eps)^-1/2,

        W (g * (u - m 1) s + b) + c  =  s (W G - W G 1 1'/n) u  +  (W b + c),    G = diag(g),

    so the folded weight acts on the raw patch, and the mean is never formed.

    Args:
        norm_weight: LayerNorm gain g, (n,).
        norm_bias: LayerNorm bias b, (n,).
        weight: Weight W of the linear map, (D, n).
        bias: Its bias c, (D,), or None.

    Returns:
        Folded weight (D, n), its rows summing to zero, and folded bias (D,).
    """
    folded = weight * norm_weight
    folded_bias = torch.mv(weight, norm_bias)
    return folded - folded.mean(dim=1, keepdim=True), folded_bias if bias is None else folded_bias + bias


def _channel_moments(x: torch.Tensor) -> torch.Tensor:
    """Return mean and mean square over the channels of a map (B, C, H, W), a map (B, 2, H, W)."""
    if not torch.jit.is_scripting():
        if torch.is_grad_enabled() and x.requires_grad and not is_traced(x):
            return _ChannelMoments.apply(x)
    return torch.stack([x.mean(dim=1), x.square().mean(dim=1)], dim=1)


class _ChannelMoments(torch.autograd.Function):
    """`_channel_moments` with its gradient, (g1 + 2 x g2) / C, in one pass where autograd takes five."""
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return torch.stack([x.mean(dim=1), x.square().mean(dim=1)], dim=1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        grad_mean, grad_square = (grad / x.shape[1]).split(1, dim=1)
        return torch.addcmul(grad_mean, x, grad_square, value=2.)


def soft_split_rstd(x: torch.Tensor, kernel_size: int, stride: int, padding: int, eps: float) -> torch.Tensor:
    """Return 1 / standard deviation of each patch of a soft split, from box sums over one channel.

    Args:
        x: Map of shape (B, C, H, W), float32 or float64: sums of squares cancel.
        kernel_size: Side of a patch, in pixels.
        stride: Distance of neighbouring patches, in pixels.
        padding: Zeros added on each side, in pixels.
        eps: Added to the variance, as LayerNorm does.

    Returns:
        Map of shape (B, 1, H', W').
    """
    # avg_pool2d counts the padding, as the unfolded zeros count in the LayerNorm
    moments = F.avg_pool2d(_channel_moments(x), kernel_size, stride, padding)
    mean, mean_square = moments.split(1, dim=1)
    return torch.rsqrt((mean_square - mean * mean).clamp(min=0.) + eps)


@torch.fx.wrap
@register_notrace_function
def soft_split_norm_linear(
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
        eps: float,
        kernel_size: int,
        stride: int,
        padding: int,
) -> torch.Tensor:
    """Return `linear(norm(soft_split(x)))` without unfolding: a convolution, scaled per token and shifted.

    Half-precision maps are convolved in float32, whatever the autocast dtype: where an image is flat, 1 / standard
    deviation reaches 316 and multiplies the rounding of the convolution.

    Args:
        x: Map of shape (B, C, H, W).
        norm_weight: LayerNorm gain, (C * kernel_size ** 2,).
        norm_bias: LayerNorm bias, as long.
        weight: Weight of the linear map, (D, C * kernel_size ** 2).
        bias: Its bias, (D,), or None.
        eps: The LayerNorm's eps.
        kernel_size: Side of a patch, in pixels.
        stride: Distance of neighbouring patches, in pixels.
        padding: Zeros added on each side, in pixels.

    Returns:
        Map of shape (B, D, H', W'), in the dtype of x.
    """
    if not torch.jit.is_scripting():
        if in_autocast(x):
            with torch.autocast(x.device.type, enabled=False):
                return soft_split_norm_linear(
                    x, norm_weight, norm_bias, weight, bias, eps, kernel_size, stride, padding)
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        norm_weight, norm_bias, weight = norm_weight.float(), norm_bias.float(), weight.float()
        bias = None if bias is None else bias.float()
    weight, bias = fold_norm_linear(norm_weight, norm_bias, weight, bias)
    return soft_split_folded_linear(x, weight, bias, eps, kernel_size, stride, padding)


@torch.fx.wrap
@register_notrace_function
def soft_split_folded_linear(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
        kernel_size: int,
        stride: int,
        padding: int,
) -> torch.Tensor:
    """Return what `soft_split_norm_linear` does, of the weight and bias that `fold_norm_linear` gives."""
    if not torch.jit.is_scripting():
        if in_autocast(x):
            with torch.autocast(x.device.type, enabled=False):
                return soft_split_folded_linear(x, weight, bias, eps, kernel_size, stride, padding)
    dtype = x.dtype
    if dtype == torch.float16 or dtype == torch.bfloat16:
        x, weight, bias = x.float(), weight.float(), bias.float()
    rstd = soft_split_rstd(x, kernel_size, stride, padding, eps)
    y = soft_split_linear(x, weight, None, kernel_size, stride, padding)
    bias = bias.view(-1, 1, 1)
    if rstd.requires_grad:
        return torch.addcmul(bias, y, rstd).to(dtype)
    return y.mul_(rstd).add_(bias).to(dtype)  # the largest map of the model: once is enough


@torch.no_grad()
def fold_modules(norm: nn.LayerNorm, linear: nn.Linear) -> Tuple[nn.LayerNorm, nn.Linear]:
    """Return a LayerNorm without gain and bias, and the linear map that `fold_norm_linear` makes for it."""
    dd = {'device': linear.weight.device, 'dtype': linear.weight.dtype}
    folded = nn.Linear(linear.in_features, linear.out_features, **dd)
    # in float64: what is folded once need not round as what is folded at every call
    parts = [None if t is None else t.double() for t in (norm.weight, norm.bias, linear.weight, linear.bias)]
    weight, bias = fold_norm_linear(*parts)
    folded.weight.copy_(weight)
    folded.bias.copy_(bias)
    return nn.LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False, **dd), folded


def tokens_to_map(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return tokens (B, height * width, D) as a map (B, D, height, width), a view."""
    return x.transpose(1, 2).unflatten(2, (height, width))
