"""Range: no NaN and no infinity in half precision, however large the Performer's keys and queries."""
import copy
from contextlib import nullcontext

import pytest
import timm
import torch
from published import golden_model, images
from timm.layers import set_fast_norm

CASES = ('t2t_vit_7.normal', 't2t_vit_7.large_norm', 't2t_vit_t_14.normal', 't2t_vit_dense.normal')
MODES = ('float16 autocast', 'bfloat16 autocast', 'float16', 'bfloat16')


@pytest.fixture(scope='module', params=CASES)
def golden(request):
    """The golden weights of a case in a shallow model: what has to stay in range is the tokens-to-token module."""
    architecture, regime = request.param.split('.')
    depth = dict(block_config=(1, 1, 1, 1)) if architecture == 't2t_vit_dense' else dict(depth=2)
    return golden_model(architecture, regime, img_size=112, num_classes=10, **depth)


def scale_keys_and_queries(model, gain):
    with torch.no_grad():
        for step in (model.patch_embed.attention1, model.patch_embed.attention2):
            linear = step.kqv if hasattr(step, 'kqv') else step.attn.qkv
            linear.weight[:2 * linear.out_features // 3] *= gain  # biases as they are


@pytest.mark.parametrize('gain', [1, 3, 10])
@pytest.mark.parametrize('mode', MODES)
def test_stays_in_range(golden, mode, gain):
    dtype = getattr(torch, mode.split()[0])
    model = copy.deepcopy(golden)
    scale_keys_and_queries(model, gain)
    autocast = 'autocast' in mode
    model.to(torch.float32 if autocast else dtype)
    with torch.autocast('cpu', dtype) if autocast else nullcontext():
        logits = model(images(1, 112, torch.float32 if autocast else dtype))
    logits.float().sum().backward()
    assert logits.isfinite().all()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all(), name


@pytest.mark.parametrize('name, kwargs', [
    ('test_t2t_vit', dict(depth=2)), ('t2t_vit_dense', dict(block_config=(1, 1)))])
def test_fast_norm_acts_outside_the_tokens(name, kwargs):
    """train.py's --fast-norm: norms in autocast's dtype. The image's own stay exact, since they see flat regions."""
    found = []
    for fast in (False, True):
        set_fast_norm(fast)
        try:
            torch.manual_seed(0)
            model = timm.create_model(name, img_size=48, **kwargs).eval()
        finally:
            set_fast_norm(False)
        x = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found.append(model(x))
            torch.testing.assert_close(torch.jit.script(model)(x), found[-1])
            torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), found[-1])
            for module in model.modules():
                if isinstance(module, torch.nn.LayerNorm):
                    module.register_forward_hook(lambda m, args, out: setattr(m, 'dtype', out.dtype))
            with torch.autocast('cpu', torch.bfloat16):
                model(x)
        assert model.patch_embed.attention1.norm1.dtype == torch.float32
        dtypes = [m.dtype for m in [*model.blocks.modules(), model.norm] if isinstance(m, torch.nn.LayerNorm)]
        assert (set(dtypes) == {torch.bfloat16}) == fast and len(dtypes) == 5
    assert torch.equal(*found)
