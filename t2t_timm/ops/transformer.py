"""Parts of a transformer layer: the MLP of the token layers, and attention for the class token alone."""
import torch
import torch.nn.functional as F

from .execution import autocast_off, cast, is_launch_bound, product_dtype, wide_dtype

__all__ = ['class_token_attention', 'mlp_skip']

STRIDE_RATIO = 16  # tokens of the map at stride 4 for a token of the backbone


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


def class_token_attention(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        num_heads: int,
        scale: float,
        drop: float = 0.,
) -> torch.Tensor:
    """Return the class token's row of softmax attention before the projection.

    Keys and values are formed only where launches decide. With q the query of a head,

        q'(Wk x_n + bk) = (Wk' q)'x_n + const,    sum_n a_n (Wv x_n + bv) = Wv (sum_n a_n x_n) + bv sum_n a_n

    and the softmax does not see the constant.

    Args:
        x: Tokens of shape (B, N, C), class token first.
        weight: Weight of the map to queries, keys and values, (3 * num_heads * head_dim, C).
        bias: Its bias, or None.
        num_heads: Number of attention heads.
        scale: Factor of the logits.
        drop: Dropout rate of the attention, in training.

    Returns:
        Class token of shape (B, 1, num_heads * head_dim).
    """
    dtype = product_dtype(x)
    x, weight, bias = cast(x, dtype), cast(weight, dtype), None if bias is None else cast(bias, dtype)
    if is_launch_bound(x, x.shape[0] * x.shape[1] * STRIDE_RATIO):
        return _one_query(x, weight, bias, num_heads, scale, drop)
    return _class_token_attention(x, weight, bias, num_heads, scale, drop)


@autocast_off
def _one_query(x, weight, bias, num_heads, scale, drop):
    q, k, v = F.linear(x, weight, bias).unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q[:, :, :1], k, v, dropout_p=drop, scale=scale).transpose(1, 2).flatten(2)


@autocast_off
def _class_token_attention(x, weight, bias, num_heads, scale, drop):
    wq, wk, wv = weight.unflatten(0, (3, num_heads, -1)).unbind(0)  # (num_heads, head_dim, C)
    q = torch.einsum('bc,hdc->bhd', x[:, 0], wq)
    if bias is not None:
        bq, _, bv = bias.unflatten(0, (3, num_heads, -1)).unbind(0)
        q = q + bq
    query = torch.einsum('bhd,hdc->bhc', q * scale, wk)
    attn = cast((query @ x.transpose(1, 2)).softmax(dim=-1, dtype=wide_dtype(x)), x.dtype)  # (B, num_heads, N)
    if drop > 0.:
        attn = torch.dropout(attn, drop, True)
    out = torch.einsum('bhc,hdc->bhd', attn @ x, wv)
    if bias is not None:
        out = out + attn.sum(dim=-1, keepdim=True) * bv
    return out.flatten(1).unsqueeze(1)
