"""Dropout by 16-bit draws: rate, scale, gradient, and its places in the token performer."""
import pytest
import torch

from t2t_timm.layers import TokenPerformer
from t2t_timm.layers.dropout import add_dropout


@pytest.mark.parametrize('drop', [0.1, 0.5, 1.])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_drops_at_the_rate_and_scales_what_it_keeps(drop, dtype):
    y = torch.ones(400_001, dtype=dtype)
    values, counts = add_dropout(torch.zeros(400_001), y, drop).unique(return_counts=True)
    expected = [0., 1 / (1 - drop)] if drop < 1. else [0.]
    torch.testing.assert_close(values.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0.)
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


@pytest.mark.parametrize('compiled', [False, True])
def test_the_two_dropouts_of_a_layer_drop_what_they_should(compiled):
    layer = TokenPerformer(3, kernel_size=7, stride=4, padding=2, drop=0.1).train()
    with torch.no_grad():  # silence all but the biases of the projection, 1, and of the MLP, 3
        for parameter in layer.parameters():
            parameter.zero_()
        layer.proj.bias.fill_(1.)
        layer.mlp[2].bias.fill_(3.)
    run = torch.compile(layer, fullgraph=True, backend='aot_eager') if compiled else layer
    values, counts = run(torch.randn(8, 3, 64, 64)).detach().mul(0.9).round().unique(return_counts=True)
    assert values.tolist() == [0., 1., 3., 4.]
    shares = counts / counts.sum()
    torch.testing.assert_close(shares, torch.tensor([.01, .09, .09, .81]), rtol=0., atol=5e-3)


def test_dropout_has_its_own_mode():
    layer = TokenPerformer(3, kernel_size=7, stride=4, padding=2).eval()
    x = torch.randn(1, 3, 24, 24)
    assert torch.equal(layer(x), layer(x))
    for drop in (layer.dp, layer.mlp[3]):  # Monte Carlo dropout: the layer stays in eval mode
        drop.train()
        assert not torch.equal(layer(x), layer(x))
        drop.eval()
