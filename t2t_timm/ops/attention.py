"""Attention of the class token alone, for the last block."""
import torch
import torch.nn as nn
import torch.nn.functional as F


def class_token_attention(x: torch.Tensor, qkv: nn.Linear, num_heads: int, scale: float) -> torch.Tensor:
    """Return the heads of the first token's attention to tokens x, (B, N, C), as (B, 1, C), without keys and values.

    With y_n the tokens and K, V a head's maps to keys and values, q (K y_n + b) is (q K) y_n + a constant, which the
    softmax over n does not see, and the sum of shares times V y_n + c is V (sum of shares times y_n) + c.
    """
    q_weight, k_weight, v_weight = qkv.weight.unflatten(0, (3, -1)).unbind()
    q_bias, _, v_bias = (None,) * 3 if qkv.bias is None else qkv.bias.unflatten(0, (3, -1)).unbind()
    k_weight, v_weight = (w.unflatten(0, (num_heads, -1)) for w in (k_weight, v_weight))  # (heads, head_dim, C)
    q = (F.linear(x[:, 0], q_weight, q_bias) * scale).reshape(x.shape[0], num_heads, 1, k_weight.shape[1])
    shares = ((q @ k_weight).squeeze(2) @ x.transpose(1, 2)).softmax(dim=-1)  # (B, heads, N)
    y = ((shares @ x).unsqueeze(2) @ v_weight.transpose(1, 2)).flatten(1).unsqueeze(1)
    return y if v_bias is None else y + v_bias
