"""The token performer: random features, its two dropouts, and its fused operations against its modules."""
import pytest
import torch

from t2t_timm import set_fused
from t2t_timm.layers import TokenPerformer


def test_random_features_are_orthogonal_rows_of_length_sqrt_m():
    w = TokenPerformer(3).w
    torch.testing.assert_close(w @ w.T, 32 * torch.eye(32), rtol=0, atol=1e-4)


@pytest.mark.parametrize('x', [torch.randn(2, 3, 40, 36), torch.full((1, 3, 21, 18), 2.6)], ids=['noise', 'flat'])
def test_fused_operations_give_the_numbers_and_gradients_of_the_modules(x):
    layer = TokenPerformer(3, kernel_size=7, stride=4, padding=2, drop=0.).double().train()
    x = x.double()

    def gradients():
        out = layer(x)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), layer.parameters())]

    written = gradients()
    with set_fused(False):
        expected = gradients()
    calls = []
    layer.dp.register_forward_hook(lambda *args: calls.append(args))  # then the modules are called
    torch.testing.assert_close(gradients(), expected, rtol=0, atol=0)
    assert len(calls) == 1
    torch.testing.assert_close(written, expected, rtol=1e-9, atol=1e-9)
    assert not torch.equal(written[0], expected[0])  # another order of operations, or nothing was fused


@pytest.mark.parametrize('compiled', [False, True])
def test_the_two_dropouts_of_a_layer_drop_what_they_should(fused, compiled):
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


def test_dropout_has_its_own_mode(fused):
    layer = TokenPerformer(3, kernel_size=7, stride=4, padding=2).eval()
    x = torch.randn(1, 3, 24, 24)
    assert torch.equal(layer(x), layer(x))
    for drop in (layer.dp, layer.mlp[3]):  # Monte Carlo dropout: the layer stays in eval mode
        drop.train()
        assert not torch.equal(layer(x), layer(x))
        drop.eval()
