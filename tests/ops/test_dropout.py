"""Dropout by 16-bit draws: rate, scale, gradient."""
import pytest
import torch

from t2t_timm.ops import add_dropout


@pytest.mark.parametrize('drop', [0.1, 0.5, 1.])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_drops_at_the_rate_and_scales_what_it_keeps(drop, dtype):
    y = torch.ones(400_001, dtype=dtype)
    values, counts = add_dropout(torch.zeros(400_001), y, drop).unique(return_counts=True)
    expected = [0., 1 / (1 - drop)] if drop < 1. else [0.]
    rounding = 2 ** -8 if dtype == torch.bfloat16 else 1e-4  # drop is rounded to 2^-16
    torch.testing.assert_close(values.double(), torch.tensor(expected, dtype=torch.float64), rtol=rounding, atol=0.)
    assert counts[0].item() / 400_001 == pytest.approx(drop, abs=4e-3)  # five standard deviations


def test_gradient_is_dropped_where_the_value_is():
    x, y = torch.randn(2, 5, 7, requires_grad=True), torch.randn(2, 5, 7, requires_grad=True)
    out = add_dropout(x, y, 0.5)
    probe = torch.randn_like(out)
    grad_x, grad_y = torch.autograd.grad(out, (x, y), probe)
    assert torch.equal(grad_x, probe)
    torch.testing.assert_close(grad_y * y, probe * (out - x), rtol=1e-4, atol=1e-5)


def test_no_dropout_is_a_sum():
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(add_dropout(x, y, 0.), x + y)


def test_gradient_keeps_the_draws_alone():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        add_dropout(torch.randn(5, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True), 0.5)
    assert [t.dtype for t in kept] == [torch.int16]


@pytest.mark.parametrize('drop', [0.25, 1.])
def test_recorded_or_on_another_device_it_is_torchs(drop):
    x, y = torch.zeros(1000), torch.ones(1000)
    torch.manual_seed(3)
    expected = torch.nn.functional.dropout(y.expand(1, -1), drop)
    torch.manual_seed(3)
    actual = torch.func.vmap(lambda x, y: add_dropout(x, y, drop), randomness='same')(x[None], y[None])
    assert torch.equal(actual, expected)
    x, y = (torch.zeros(9, device='meta', requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = add_dropout(x, y, drop)
    assert out.shape == (9,) and [t.dtype for t in kept] == [torch.bool]
    assert [g.shape for g in torch.autograd.grad(out.sum(), (x, y))] == [(9,), (9,)]
