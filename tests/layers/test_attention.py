"""Attention and MLP of the study variants, as parts of timm's blocks."""
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
from torch.nn.utils import prune

from t2t_timm import set_fused
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
def test_what_is_hooked_is_called(attention):
    layer, calls = attention(32), []
    for name in ('attn_drop', 'proj', 'proj_drop'):
        layer.get_submodule(name).register_forward_hook(lambda *args, name=name: calls.append(name))
    layer.fused_attn = False
    layer(torch.randn(1, 3, 32))
    assert calls == ['attn_drop', 'proj', 'proj_drop']


@pytest.mark.parametrize('attention', ATTENTIONS)
@pytest.mark.parametrize('option', ['qk_norm', 'scale_attn_norm'])
def test_options_that_the_attentions_do_not_have(attention, option):
    with pytest.raises(ValueError, match=f'{attention.__name__} has no {option}'):
        timm.create_model('test_t2t_vit', attn_layer=attention, **{option: True})


def test_hidden_width_that_the_mlp_does_not_have():
    with pytest.raises(ValueError, match=r'hidden_features must be 192 \(mlp_ratio=3\), not 128'):
        timm.create_model('test_t2t_vit', mlp_layer=GhostMlp, mlp_ratio=2.)


@pytest.mark.parametrize('name', ['t2t_vit_c_14', 't2t_vit_14_se', 't2t_vit_16_ghost'])
def test_every_module_that_has_weights_is_called(called, name):
    """Pruning, offloading and sharding make the weights of a module ready when it is called."""
    model = timm.create_model(name, img_size=32, depth=2).eval()
    with set_fused(False):
        names = set(called(model, torch.randn(1, 3, 32, 32)))
    weighted = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    assert len(weighted) > 10 and weighted <= names


@pytest.fixture
def ghost():
    torch.manual_seed(0)
    return timm.create_model('t2t_vit_16_ghost', img_size=32, depth=2, embed_dim=48, num_classes=5).eval()


def test_pruned_scales_of_ghost_features_are_trained(ghost):
    scales = [m for m in ghost.modules() if isinstance(m, nn.Conv1d)]
    for module in scales:
        prune.random_unstructured(module, 'weight', .5)
    for _ in range(2):  # the second pass needs weights that are computed anew
        ghost(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert len(scales) == 10
    for module in scales:
        assert module.weight_orig.grad.any() and not module.weight_orig.grad[module.weight_mask == 0].any()


@pytest.mark.parametrize('where', ['cpu', 'disk'])
def test_offloaded_ghost(ghost, tmp_path, where):
    accelerate = pytest.importorskip('accelerate', reason='pip install accelerate')
    x = torch.randn(2, 3, 32, 32)
    expected = ghost(x)
    offload = {'cpu': accelerate.cpu_offload, 'disk': partial(accelerate.disk_offload, offload_dir=tmp_path)}[where]
    offload(ghost, execution_device=torch.device('cpu'))
    assert all(p.is_meta for p in ghost.parameters())
    with torch.no_grad():
        torch.testing.assert_close(ghost(x), expected)
