"""The soft split as the paper has it."""
import pytest
import torch
from reference import soft_split as reference_soft_split

from t2t_timm.layers import soft_split, soft_split_size, tokens_to_map


@pytest.mark.parametrize('kernel_size, stride, padding', [(7, 4, 2), (3, 2, 1)])
def test_soft_split(kernel_size, stride, padding):
    x = torch.randn(2, 3, 19, 26)
    expected, (height, width) = reference_soft_split(x, kernel_size, stride, padding)
    assert (height, width) == tuple(soft_split_size(size, kernel_size, stride, padding) for size in (19, 26))
    assert tokens_to_map(expected, height, width)[1, 2, 1, 3] == expected[1, width + 3, 2]
    torch.testing.assert_close(soft_split(x, kernel_size, stride, padding), expected, rtol=0, atol=0)
