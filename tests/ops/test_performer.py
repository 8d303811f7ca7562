"""The Performer's attention against equation (1) with the attention matrix written out, and its written gradient."""
import math
from types import SimpleNamespace

import pytest
import torch

from t2t_timm.ops import performer_attention, performer_skip

EPS = 1e-8


def skip(kqv, w, eps, weight, bias, drop=0.):
    return performer_skip(kqv, w, eps, SimpleNamespace(weight=weight, bias=bias), drop)


def reference(kqv, w, eps=EPS):
    """Equation (1), in float64, with phi(q) phi(k)' as the matrix that linear attention never forms."""
    k, q, v = kqv.double().chunk(3, dim=-1)
    w = w.double()
    log_k, log_q = (x @ w.T - (x * x).sum(-1, keepdim=True) / 2 - math.log(len(w)) / 2 for x in (k, q))
    weights = torch.logsumexp(log_q.unsqueeze(2) + log_k.unsqueeze(1), dim=-1).exp()
    return weights @ v / (weights.sum(-1, keepdim=True) + eps)


@pytest.fixture
def inputs():
    """Keys, queries and values, random features, and weight and bias of the projection: float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 50, 24), (4, 8), (8, 8), (8,)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def scaled(kqv, gain):
    """Keys and queries times a gain."""
    return torch.cat([gain * kqv[..., :16], kqv[..., 16:]], dim=-1)


@pytest.mark.parametrize('gain', [0.1, 1., 2.])
@pytest.mark.parametrize('grad', [False, True])
def test_equals_the_equation(inputs, gain, grad):
    kqv, w, weight, bias = inputs
    kqv = scaled(kqv, gain)
    a = reference(kqv, w)
    torch.testing.assert_close(performer_attention(kqv, w, EPS), a, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(performer_attention(kqv, w, EPS, weight), a @ weight.T, rtol=1e-10, atol=1e-12)
    out = skip(kqv.requires_grad_(grad), w, EPS, weight, bias)
    torch.testing.assert_close(out, kqv[..., 16:] + a @ weight.T + bias, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('eps', [0., 1e-8, 1e-2])
def test_eps_keeps_its_meaning(inputs, eps):
    kqv, w, weight, bias = inputs
    kqv = scaled(kqv, 2.)
    expected = kqv[..., 16:] + reference(kqv, w, eps) @ weight.T + bias
    torch.testing.assert_close(skip(kqv, w, eps, weight, bias), expected, rtol=1e-9, atol=1e-10)
    other = kqv[..., 16:] + reference(kqv, w, 1e-4) @ weight.T + bias
    assert (other - expected).abs().max() > 1e-2  # or the above would prove nothing


@pytest.mark.parametrize('drop', [0., 0.5])
def test_gradient_and_second_derivative(drop):
    torch.manual_seed(0)
    shapes = (2, 4, 6), (3, 2), (2, 2), (2,)
    kqv, w, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in shapes)

    def function(kqv, weight, bias):
        torch.manual_seed(1)  # the same elements dropped each time
        return skip(kqv, w, EPS, weight, bias, drop)

    args = [t.requires_grad_() for t in (kqv, weight, bias)]
    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args)


@pytest.mark.parametrize('create_graph', [False, True])
@pytest.mark.parametrize('drop', [0., 0.5])
def test_gradient_under_vmap(inputs, drop, create_graph):
    """Several gradients at once (is_grads_batched, jacobian(vectorize=True)) are those taken one by one."""
    kqv, w, weight, bias = inputs
    args = [t.requires_grad_() for t in (kqv, weight, bias)]
    out = skip(kqv, w, EPS, weight, bias, drop)
    probes = torch.randn(3, *out.shape, dtype=out.dtype)
    expected = zip(*(torch.autograd.grad(out, args, probe, retain_graph=True) for probe in probes), strict=True)
    actual = torch.autograd.grad(out, args, probes, is_grads_batched=True, create_graph=create_graph)
    for gradients, gradient in zip(actual, expected, strict=True):
        torch.testing.assert_close(gradients, torch.stack(gradient), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize('gain', [1., 2., 3.])
def test_gradient_is_that_of_the_equation_where_eps_decides(inputs, gain):
    kqv, w, weight, bias = inputs
    args = [t.requires_grad_() for t in (scaled(kqv, gain), weight, bias)]
    out = skip(args[0], w, EPS, *args[1:])
    expected = args[0][..., 16:] + reference(args[0], w) @ weight.T + bias
    probe = torch.randn_like(out)
    for actual, gradient in zip(
            torch.autograd.grad(out, args, probe), torch.autograd.grad(expected, args, probe), strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-8, atol=1e-8 * gradient.abs().max())


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize('gain', [1., 10., 100., 1000.])
def test_no_range_is_left(inputs, dtype, gain):
    kqv, w, weight, bias = (t.to(dtype) for t in inputs)
    args = [t.requires_grad_() for t in (scaled(kqv, gain), weight, bias)]
    with torch.no_grad():
        inference = skip(args[0], w, EPS, *args[1:])
    out = skip(args[0], w, EPS, *args[1:])
    assert out.dtype == dtype and torch.equal(out, inference)
    gradients = torch.autograd.grad(out.float().sum(), args)
    assert all(t.isfinite().all() for t in (out, *gradients))


@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 1e-2), (torch.bfloat16, 6e-2), (torch.float32, 1e-5)])
def test_precision(inputs, dtype, tolerance):
    kqv, w, weight, bias = (t.to(dtype) for t in inputs)
    expected = kqv.double()[..., 16:] + reference(kqv, w) @ weight.double().T + bias.double()
    out = skip(kqv, w, EPS, weight, bias)
    assert (out - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize('num_tokens', [3136, 16384, 2 ** 18])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_sums_over_alike_tokens_stay_in_range(num_tokens, dtype, tolerance):
    """Tokens of a flat image, the largest 2048 x 2048 pixels, with values of 30; 16 bits end at 65504."""
    generator = torch.Generator().manual_seed(0)
    kqv = 0.2 * torch.randn(1, 1, 192, generator=generator)
    kqv[..., 128:] = 30.
    kqv = kqv.repeat(1, num_tokens, 1).to(dtype)
    w, weight = torch.randn(32, 64, generator=generator).to(dtype), torch.randn(64, 64, generator=generator).to(dtype)
    args = kqv, w, 1e-8, weight / 8, torch.zeros(64, dtype=dtype)
    y, expected = (skip(*(t.to(d) if isinstance(t, torch.Tensor) else t for t in args))
                   for d in (dtype, torch.float64))
    assert expected.abs().max() > 60. and (y - expected).abs().max() < tolerance * expected.abs().max()
