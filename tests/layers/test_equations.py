"""Models against the equations written out plainly (tests/reference.py), over sizes, channels, batches, dtypes."""
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import t2t_vit, tokens_to_token

from t2t_timm import set_fused
from t2t_timm.layers import tokens_grid_size

TOKEN_TYPES = ('performer', 'transformer', 'convolution')
SIZES = st.integers(3, 70)


def small_model(token_type='performer', **kwargs):
    return timm.create_model('test_t2t_vit', num_classes=7, token_type=token_type, depth=2, **kwargs)


@settings(max_examples=40, deadline=None)
@given(
    height=SIZES,
    width=SIZES,
    in_chans=st.integers(1, 5),
    batch=st.integers(1, 2),
    token_type=st.sampled_from(TOKEN_TYPES),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_model_equals_reference(height, width, in_chans, batch, token_type, dtype):
    torch.manual_seed(height * 71 + width)
    model = small_model(token_type, img_size=(height, width), in_chans=in_chans, dtype=dtype).eval()
    for parameter in model.parameters():  # away from the initial zeros and ones
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(batch, in_chans, height, width, dtype=dtype)
    state = {k: v.double() for k, v in model.state_dict().items()}
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5

    tokens, grid = tokens_to_token(state, x.double())
    assert grid == tokens_grid_size((height, width)) == model.patch_embed.grid_size
    features, logits = t2t_vit(state, x.double(), num_heads=4)
    probe = torch.randn_like(logits)
    expected = torch.autograd.functional.vjp(lambda t: t2t_vit(state, t, 4)[1], x.double(), probe)[1]
    x.requires_grad_()
    out = model(x)
    out.backward(probe.to(dtype))
    actual = model.patch_embed(x), model.forward_features(x), out, x.grad
    for ours, theirs in zip(actual, (tokens, features, logits, expected), strict=True):
        assert ours.dtype == dtype and (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize('affine, bias', [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize('token_type', ['performer', 'transformer'])
def test_norms_and_linear_maps_without_gain_or_bias(token_type, affine, bias):
    torch.manual_seed(0)
    model = small_model(token_type, img_size=(21, 34)).eval()
    step, norm = model.patch_embed.attention1, partial(nn.LayerNorm, elementwise_affine=affine, bias=bias)
    step.norm1, step.norm2 = norm(147), norm(64)
    if token_type == 'performer':
        step.kqv = nn.Linear(147, 192, bias=False)
    else:
        step.mlp.fc1 = nn.Linear(64, 64, bias=False)
    model.double()
    x = torch.randn(2, 3, 21, 34, dtype=torch.float64)
    probe = torch.randn(2, 7, dtype=torch.float64)

    def run(on):
        with set_fused(on):
            out = model(x)
            return [out, *torch.autograd.grad((out * probe).sum(), model.parameters())]

    torch.testing.assert_close(run(True), run(False), rtol=1e-9, atol=1e-9)
