"""The class token's attention without keys and values, against timm's attention."""
import pytest
import torch
from timm.layers import Attention

from t2t_timm.ops import class_token_attention


@pytest.mark.parametrize('bias', [False, True])
def test_is_the_first_row_of_attention(bias):
    torch.manual_seed(0)
    attn = Attention(24, num_heads=3, qkv_bias=bias).double()
    torch.nn.init.normal_(attn.qkv.weight)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    y = attn.proj(class_token_attention(x, attn.qkv, attn.num_heads, attn.scale))
    torch.testing.assert_close(y, attn(x)[:, :1], rtol=1e-10, atol=1e-10)
