"""GELU and linear map with a written gradient, and the token layers' MLP, against torch's in float64."""
import pytest
import torch
import torch.nn.functional as F

from t2t_timm.ops import gelu_linear, mlp_skip


def plain(x, weight, bias):
    return F.linear(F.gelu(x), weight, bias)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3, 5), (4, 5), (4,)))


@pytest.mark.parametrize('bias', [False, True])
def test_value_and_gradient(inputs, bias):
    x, weight, b = inputs
    args = (x, weight, b if bias else None)
    out, expected = gelu_linear(*args), plain(*args)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    probe, wanted = torch.randn_like(out), args[:2 + bias]
    torch.testing.assert_close(
        torch.autograd.grad(out, wanted, probe), torch.autograd.grad(expected, wanted, probe), rtol=1e-12, atol=1e-12)


def test_second_derivative(inputs):
    assert torch.autograd.gradcheck(gelu_linear, inputs)
    assert torch.autograd.gradgradcheck(gelu_linear, inputs)


@pytest.mark.parametrize('tokens', [5, 1100])
def test_is_differentiated_twice_as_the_product_is(tokens):
    x, weight = torch.randn(1, tokens, 128, requires_grad=True), torch.randn(256, 128, requires_grad=True)

    def second(linear, *inputs):
        grad, = torch.autograd.grad(linear(*inputs, None).square().sum(), inputs[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), inputs)

    expected = second(plain, *(t.detach().double().requires_grad_() for t in (x, weight)))
    for ours, theirs in zip(second(gelu_linear, x, weight), expected, strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_the_gradient_keeps_the_hidden_tokens_and_not_their_activation(inputs):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gelu_linear(*inputs)
    hidden = [t for t in kept if t.shape == inputs[0].shape]
    assert len(hidden) == 1 and torch.equal(hidden[0], inputs[0])


@pytest.mark.parametrize('dtype, tolerance', [
    (torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_mlp_skip(dtype, tolerance):
    torch.manual_seed(0)
    x, (norm_weight, norm_bias), weights, biases = (
        torch.randn(shape).to(dtype) for shape in ((2, 9, 8), (2, 8), (2, 8, 8), (2, 8)))
    args = [t.clone().requires_grad_() for t in (
        x, norm_weight, norm_bias, weights[0], biases[0], weights[1], biases[1])]
    wide = [t.detach().double().requires_grad_() for t in args]

    def reference(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2):
        y = F.layer_norm(x, (8,), norm_weight, norm_bias, 1e-5)
        return x + plain(F.linear(y, weight1, bias1), weight2, bias2)

    out, expected = mlp_skip(*args[:3], 1e-5, *args[3:]), reference(*wide)
    assert out.dtype == dtype
    probe = torch.randn_like(expected).to(dtype)
    actual = [out, *torch.autograd.grad(out, args, probe)]
    for ours, theirs in zip(actual, [expected, *torch.autograd.grad(expected, wide, probe.double())], strict=True):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.fixture
def skip_inputs():
    """Arguments of mlp_skip without its eps, in float64."""
    torch.manual_seed(0)
    shapes = (2, 5, 4), (4,), (4,), (6, 4), (6,), (4, 6), (4,)
    return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)


def test_mlp_skip_is_differentiated_twice(skip_inputs):
    def run(*args):
        return mlp_skip(*args[:3], 1e-5, *args[3:])
    assert torch.autograd.gradcheck(run, skip_inputs)
    assert torch.autograd.gradgradcheck(run, skip_inputs)


def test_mlp_skip_with_frozen_parameters(skip_inputs):
    x, *parameters = (t.detach() for t in skip_inputs)
    x.requires_grad_()
    out = mlp_skip(x, *parameters[:2], 1e-5, *parameters[2:])
    grad, = torch.autograd.grad(out.sum(), x)
    everything, = torch.autograd.grad(mlp_skip(*skip_inputs[:3], 1e-5, *skip_inputs[3:]).sum(), skip_inputs[0])
    assert torch.equal(grad, everything)


def test_mlp_skip_keeps_its_input_once_and_the_hidden_tokens(skip_inputs):
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mlp_skip(*skip_inputs[:3], 1e-5, *skip_inputs[3:])
    tokens = [t for t in kept if t.shape[:2] == (2, 5) and t.shape[2] > 1]  # without mean and rstd
    assert [t.shape[2] for t in tokens] == [4, 6] and torch.equal(tokens[0], skip_inputs[0])


def test_mlp_skip_drops_out_what_it_adds():
    torch.manual_seed(0)
    x, norm, weight, bias = torch.randn(4, 500, 8), torch.ones(8), torch.zeros(8, 8), torch.full((8,), 3.)
    added = mlp_skip(x, norm, norm, 1e-5, weight, bias, weight, bias, drop=0.25) - x
    values, counts = added.round().unique(return_counts=True)
    assert values.tolist() == [0., 4.] and counts[0] / counts.sum() == pytest.approx(0.25, abs=2e-2)
