"""The soft split as the paper has it, and its modules folded into one."""
import pytest
import torch
import torch.nn as nn
from reference import soft_split as reference_soft_split

from t2t_timm.layers import fold_modules, soft_split, soft_split_size, tokens_to_map


@pytest.mark.parametrize('kernel_size, stride, padding', [(7, 4, 2), (3, 2, 1)])
def test_soft_split(kernel_size, stride, padding):
    x = torch.randn(2, 3, 19, 26)
    expected, (height, width) = reference_soft_split(x, kernel_size, stride, padding)
    assert (height, width) == tuple(soft_split_size(size, kernel_size, stride, padding) for size in (19, 26))
    assert tokens_to_map(expected, height, width)[1, 2, 1, 3] == expected[1, width + 3, 2]
    torch.testing.assert_close(soft_split(x, kernel_size, stride, padding), expected, rtol=0, atol=0)


@pytest.mark.parametrize('bias', [False, True])
def test_folded_modules_are_the_modules(bias):
    torch.manual_seed(0)
    norm, linear = nn.LayerNorm(20, eps=1e-3), nn.Linear(20, 6, bias=bias)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = 3 + 0.1 * torch.randn(50, 20)
    folded_norm, folded = fold_modules(norm, linear)
    assert folded_norm.weight is None and folded.weight.sum(dim=1).abs().max() < 1e-6
    torch.testing.assert_close(folded(folded_norm(x)), linear(norm(x)), rtol=1e-4, atol=1e-5)
