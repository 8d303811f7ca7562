"""The MLP against its modules, and the class token's attention against all tokens' attention, in float64."""
import pytest
import torch
import torch.nn as nn

from t2t_timm.ops import class_token_attention, mlp_skip


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
    return mlp_skip(x, norm.weight, norm.bias, norm.eps, fc1.weight, fc1.bias, fc2.weight, fc2.bias, drop.p)


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


def reference(x, weight, bias, num_heads, scale):
    B, N, _ = x.shape
    qkv = x @ weight.T + (0. if bias is None else bias)
    q, k, v = qkv.view(B, N, 3, num_heads, -1).permute(2, 0, 3, 1, 4)
    return ((q @ k.transpose(-1, -2) * scale).softmax(-1) @ v).transpose(1, 2).flatten(2)[:, :1]


@pytest.mark.parametrize('num_heads, head_dim', [(1, 12), (4, 3), (3, 5)])  # the last is not as wide as the tokens
@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('few_launches', [False, True])
def test_attention_is_the_first_row_with_its_gradients(request, num_heads, head_dim, bias, few_launches):
    if few_launches:
        request.getfixturevalue('launch_bound')
    torch.manual_seed(0)
    width = num_heads * head_dim
    x = torch.randn(2, 7, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3 * width, 12, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3 * width, dtype=torch.float64, requires_grad=True) if bias else None
    args = x, weight, bias, num_heads, 0.3
    out, expected = class_token_attention(*args), reference(*args)
    assert out.shape == (2, 1, width)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    inputs, probe = [t for t in args[:3] if t is not None], torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, probe), torch.autograd.grad(expected, inputs, probe), rtol=1e-10, atol=1e-10)


def test_dropout_of_the_attention_is_unbiased():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 7, 12, dtype=torch.float64), torch.randn(36, 12, dtype=torch.float64)
    expected = class_token_attention(x, weight, None, 4, 0.3)
    batch = class_token_attention(x.expand(20_000, -1, -1), weight, None, 4, 0.3, drop=0.25)
    assert not torch.equal(batch[0], batch[1])
    assert (batch.mean(dim=0) - expected[0]).abs().max() < 5 * (batch.std(dim=0) / 20_000 ** 0.5).max()
