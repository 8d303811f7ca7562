"""The MLP of the token layers, in the dtype of its tokens."""
import torch
import torch.nn.functional as F

from .execution import autocast_off, cast

__all__ = ['mlp_skip']


@autocast_off
def mlp_skip(
        x: torch.Tensor,
        norm_weight: torch.Tensor | None,
        norm_bias: torch.Tensor | None,
        eps: float,
        weight1: torch.Tensor,
        bias1: torch.Tensor | None,
        weight2: torch.Tensor,
        bias2: torch.Tensor | None,
        drop: float = 0.,
) -> torch.Tensor:
    """Return `x + dropout(linear2(gelu(linear1(norm(x)))))`, in the dtype of x throughout.

    Args:
        x: Tokens of shape (B, N, D).
        norm_weight: Gain of the LayerNorm, (D,), or None.
        norm_bias: Its bias, (D,), or None as the gain is.
        eps: Its eps.
        weight1: Weight of the first linear map, (hidden, D).
        bias1: Its bias, (hidden,), or None.
        weight2: Weight of the second linear map, (D, hidden).
        bias2: Its bias, (D,), or None.
        drop: Dropout rate, in training.
    """
    weight1, weight2 = cast(weight1, x.dtype), cast(weight2, x.dtype)
    norm_weight, norm_bias, bias1, bias2 = (
        None if t is None else cast(t, x.dtype) for t in (norm_weight, norm_bias, bias1, bias2))
    y = F.layer_norm(x, weight1.shape[1:], norm_weight, norm_bias, eps)
    y = F.linear(F.gelu(F.linear(y, weight1, bias1)), weight2, bias2)
    return x + (F.dropout(y, drop) if drop > 0. else y)
