"""Attention and MLP of the study variants, as parts of timm's blocks."""
import pytest
import timm
import torch

from t2t_timm.layers import GhostAttention, GhostMlp, SqueezeExciteAttention

ATTENTIONS = (SqueezeExciteAttention, GhostAttention)


@pytest.mark.parametrize('attention', ATTENTIONS)
@pytest.mark.parametrize('masked', ['not', 'bool', 'float', 'causal'])
def test_fused_and_unfused_attention_with_masks(attention, masked):
    torch.manual_seed(0)
    layer = attention(32, num_heads=4, qkv_bias=True, dtype=torch.float64).eval()
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    lower = torch.ones(7, 7, dtype=torch.bool).tril()
    kwargs = {
        'not': dict(),
        'bool': dict(attn_mask=lower),
        'float': dict(attn_mask=torch.zeros(7, 7, dtype=x.dtype).masked_fill(~lower, -torch.inf)),
        'causal': dict(is_causal=True),
    }[masked]
    outputs = []
    for fused in (True, False):
        layer.fused_attn = fused
        outputs.append(layer(x, **kwargs))
    torch.testing.assert_close(*outputs)
    same = torch.allclose(outputs[0], layer(x, attn_mask=lower))
    assert same == (masked != 'not')  # or no mask had an effect


@pytest.mark.parametrize('attention', ATTENTIONS)
@pytest.mark.parametrize('option', ['qk_norm', 'scale_attn_norm'])
def test_options_that_the_attentions_do_not_have(attention, option):
    with pytest.raises(ValueError, match=f'{attention.__name__} has no {option}'):
        timm.create_model('test_t2t_vit', attn_layer=attention, **{option: True})


def test_options_that_the_mlp_does_not_have():
    with pytest.raises(ValueError, match=r'hidden_features must be 192 \(mlp_ratio=3\), not 128'):
        timm.create_model('test_t2t_vit', mlp_layer=GhostMlp, mlp_ratio=2.)
    with pytest.raises(ValueError, match='GhostMlp has no scale_mlp_norm'):
        timm.create_model('test_t2t_vit', mlp_layer=GhostMlp, mlp_ratio=3., scale_mlp_norm=True)


@pytest.mark.parametrize('kwargs', [
    dict(attn_layer=SqueezeExciteAttention), dict(attn_layer=GhostAttention), dict(mlp_layer=GhostMlp, mlp_ratio=3.),
], ids=['se', 'ghost attention', 'ghost mlp'])
def test_the_parts_serve_in_any_model(kwargs):
    torch.manual_seed(0)
    model = timm.create_model('test_t2t_vit', depth=2, num_classes=5, reg_tokens=1, **kwargs).eval()
    x = torch.randn(2, 3, 56, 56)
    torch.testing.assert_close(model(x), model.forward_head(model.forward_features(x)))
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
