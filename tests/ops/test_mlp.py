"""The MLP against its modules, in float64."""
import pytest
import torch
import torch.nn as nn

from t2t_timm.ops import mlp_skip


def mlp_modules(affine=True, bias=True, drop=0.):
    """LayerNorm, Linear, GELU, Linear and Dropout of random weights, in float64."""
    torch.manual_seed(0)
    modules = nn.Sequential(
        nn.LayerNorm(12, eps=1e-3, elementwise_affine=affine), nn.Linear(12, 20, bias=bias), nn.GELU(),
        nn.Linear(20, 12, bias=bias), nn.Dropout(drop)).double()
    for parameter in modules.parameters():  # away from ones and zeros
        nn.init.normal_(parameter, std=0.5)
    return modules


def run_mlp(x, modules):
    norm, fc1, _, fc2, drop = modules
    return mlp_skip(x, norm, fc1, fc2, drop.p)


@pytest.mark.parametrize('affine', [False, True])
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('drop', [0., 0.3])
def test_mlp_is_its_modules_with_their_gradients(affine, bias, drop):
    modules = mlp_modules(affine, bias, drop)
    x = torch.randn(3, 7, 12, dtype=torch.float64, requires_grad=True)
    probe = torch.randn_like(x)
    torch.manual_seed(1)  # the same elements dropped each time
    out = run_mlp(x, modules)
    torch.manual_seed(1)
    expected = x + modules(x)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    inputs = [x, *modules.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, probe), torch.autograd.grad(expected, inputs, probe), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('autocast', [False, True])
def test_mlp_runs_in_the_dtype_of_its_tokens(dtype, autocast):
    modules = mlp_modules().float()
    x = torch.randn(3, 7, 12, dtype=dtype)
    with torch.no_grad():
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            out = run_mlp(x, modules)
        expected = x + modules.to(dtype)(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out, expected)
