"""The token performer's two dropouts."""
import pytest
import torch

from t2t_timm.layers import TokenPerformer


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
