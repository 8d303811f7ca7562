"""The Performer's attention against equation (1) with the attention matrix written out, and its written gradient."""
import math
from types import SimpleNamespace

import pytest
import torch

from t2t_timm.layers import performer_attention
from t2t_timm.ops import performer_skip

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


@pytest.mark.parametrize('gain, eps', [(0.1, EPS), (1., EPS), (2., 0.), (2., EPS), (2., 1e-2), (3., EPS)])
def test_equals_the_equation_with_its_gradients(inputs, gain, eps):
    kqv, w, weight, bias = inputs
    kqv = scaled(kqv, gain)
    args = [t.requires_grad_() for t in (kqv, weight, bias)]
    a = reference(kqv, w, eps)
    # where keys and queries are large, eps decides the result
    assert gain < 2. or (reference(kqv, w, 1e-4) - a).abs().max() > 1e-2
    torch.testing.assert_close(performer_attention(kqv, w, eps), a, rtol=1e-10, atol=1e-12)
    expected = kqv[..., 16:] + a @ weight.T + bias
    out = skip(kqv, w, eps, weight, bias)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    probe = torch.randn_like(out)
    for actual, gradient in zip(
            torch.autograd.grad(out, args, probe), torch.autograd.grad(expected, args, probe), strict=True):
        torch.testing.assert_close(actual, gradient, rtol=1e-8, atol=1e-8 * gradient.abs().max())


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


@pytest.mark.parametrize('num_tokens', [3136, 2 ** 18])
@pytest.mark.parametrize('dtype, tolerance', [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_sums_over_alike_tokens_stay_in_range(num_tokens, dtype, tolerance):
    """Tokens of a flat image, the largest 2048 x 2048 pixels, with values of 30; 16 bits end at 65504."""
    generator = torch.Generator().manual_seed(0)
    kqv = 0.2 * torch.randn(1, 1, 48, generator=generator)
    kqv[..., 32:] = 30.
    kqv = kqv.to(dtype).repeat(1, num_tokens, 1)
    w, weight = torch.randn(8, 16, generator=generator).to(dtype), torch.randn(16, 16, generator=generator).to(dtype)
    weight, bias = weight / 4, torch.zeros(16, dtype=dtype)
    y = skip(kqv, w, EPS, weight, bias)
    expected = skip(kqv.double(), w.double(), EPS, weight.double(), bias.double())
    assert expected.abs().max() > 60. and (y - expected).abs().max() < tolerance * expected.abs().max()
