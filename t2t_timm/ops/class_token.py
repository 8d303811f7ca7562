"""Attention of one query, the class token's, without keys and values: all that the logits read of the last block."""

import torch

__all__ = ['class_token_attention']


def class_token_attention(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        num_heads: int,
        scale: float,
        drop: float = 0.,
) -> torch.Tensor:
    """Return the class token's row of softmax attention, before the projection.

    With q the query of a head,

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
    wq, wk, wv = weight.unflatten(0, (3, num_heads, -1)).unbind(0)  # (num_heads, head_dim, C)
    q = torch.einsum('bc,hdc->bhd', x[:, 0], wq)
    if bias is not None:
        bq, _, bv = bias.unflatten(0, (3, num_heads, -1)).unbind(0)
        q = q + bq
    query = torch.einsum('bhd,hdc->bhc', q * scale, wk)
    attn = (query @ x.transpose(1, 2)).softmax(dim=-1)  # (B, num_heads, N)
    if drop > 0.:
        attn = torch.dropout(attn, drop, True)
    out = torch.einsum('bhc,hdc->bhd', attn @ x, wv)
    if bias is not None:
        out = out + attn.sum(dim=-1, keepdim=True) * bv
    return out.flatten(1).unsqueeze(1)
