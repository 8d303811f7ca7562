"""The soft split and the positions as the paper has them."""
import pytest
import torch
from reference import soft_split as reference_soft_split

from t2t_timm.layers import sinusoidal_pos_embed, soft_split, soft_split_size, tokens_to_map


@pytest.mark.parametrize('kernel_size, stride, padding', [(7, 4, 2), (3, 2, 1)])
def test_soft_split(kernel_size, stride, padding):
    x = torch.randn(2, 3, 19, 26)
    expected, (height, width) = reference_soft_split(x, kernel_size, stride, padding)
    assert (height, width) == tuple(soft_split_size(size, kernel_size, stride, padding) for size in (19, 26))
    assert tokens_to_map(expected, height, width)[1, 2, 1, 3] == expected[1, width + 3, 2]
    torch.testing.assert_close(soft_split(x, kernel_size, stride, padding), expected, rtol=0, atol=0)


def test_sinusoidal_table():
    table = sinusoidal_pos_embed(5, 6, dtype=torch.float64)[0]
    angle = torch.tensor([[p / 10000 ** (2 * (c // 2) / 6) for c in range(6)] for p in range(5)], dtype=torch.float64)
    expected = torch.where(torch.arange(6) % 2 == 0, angle.sin(), angle.cos())
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-7)
