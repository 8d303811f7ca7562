"""Fast paths against the equations written out plainly (tests/reference.py), over sizes, channels, batches, dtypes."""
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import soft_split as reference_soft_split
from reference import t2t_vit, tokens_to_token
from timm.utils import reparameterize_model

import t2t_timm.layers.tokens_to_token as tokens_to_token_module
from t2t_timm.layers import (
    TokenPerformer,
    TokensToToken,
    performer_attention,
    performer_skip,
    sinusoidal_pos_embed,
    soft_split,
    tokens_grid_size,
)

TOKEN_TYPES = ('performer', 'transformer', 'convolution')
SIZES = st.integers(3, 70)


def small_model(token_type='performer', **kwargs):
    return timm.create_model('test_t2t_vit', num_classes=7, token_type=token_type, depth=2, **kwargs)


@settings(max_examples=40, deadline=None)
@given(
    height=SIZES,
    width=SIZES,
    in_chans=st.integers(1, 4),
    batch=st.integers(1, 3),
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
    tolerance = dict(rtol=1e-9, atol=1e-9) if dtype == torch.float64 else dict(rtol=1e-3, atol=1e-4)

    tokens, grid = tokens_to_token(state, x.double())
    assert grid == tokens_grid_size((height, width)) == model.grid_size
    features, logits = t2t_vit(state, x.double(), num_heads=4)
    probe = torch.randn_like(logits)
    expected = torch.autograd.functional.vjp(lambda t: t2t_vit(state, t, 4)[1], x.double(), probe)[1]
    x.requires_grad_()
    out = model(x)
    torch.testing.assert_close(model.tokens_to_token(x).flatten(2).transpose(1, 2).double(), tokens, **tolerance)
    torch.testing.assert_close(model.forward_features(x).double(), features, **tolerance)
    torch.testing.assert_close(out.double(), logits, **tolerance)
    out.backward(probe.to(dtype))
    if dtype == torch.float64:
        torch.testing.assert_close(x.grad, expected, **tolerance)


@pytest.mark.parametrize('token_type', ['performer', 'transformer'])
def test_gradients_of_every_parameter(token_type):
    model = small_model(token_type, img_size=(21, 34), dtype=torch.float64).eval()
    x = torch.randn(2, 3, 21, 34, dtype=torch.float64)
    state = {k: v.detach().clone().requires_grad_() for k, v in model.state_dict().items()}
    probe = torch.randn(2, 7, dtype=torch.float64)
    (t2t_vit(state, x, 4)[1] * probe).sum().backward()
    (model(x) * probe).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize('drop', [0., 0.5])
def test_performer_gradient_and_second_derivative(drop):
    torch.manual_seed(0)
    kqv, w = torch.randn(2, 9, 12, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    weight, bias = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def function(kqv, weight, bias):
        torch.manual_seed(1)  # the same elements dropped each time
        return performer_skip(kqv, w, 1e-8, weight, bias, drop)

    args = [t.requires_grad_() for t in (kqv, weight, bias)]
    plain = performer_attention(kqv, w, 1e-8) @ weight.T + bias
    if drop == 0.:
        torch.testing.assert_close(function(*args), kqv[..., 8:] + plain, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(function, args)
    assert torch.autograd.gradgradcheck(function, args)


@pytest.mark.parametrize('kernel_size, stride, padding', [(7, 4, 2), (3, 2, 1)])
def test_soft_split(kernel_size, stride, padding):
    x = torch.randn(2, 3, 19, 26)
    expected, _ = reference_soft_split(x, kernel_size, stride, padding)
    torch.testing.assert_close(soft_split(x, kernel_size, stride, padding), expected, rtol=0, atol=0)


def test_random_features_are_orthogonal_rows_of_length_sqrt_m():
    w = TokenPerformer(3).w
    torch.testing.assert_close(w @ w.T, 32 * torch.eye(32), rtol=0, atol=1e-4)


def test_sinusoidal_table():
    table = sinusoidal_pos_embed(5, 6, dtype=torch.float64)[0]
    for position in range(5):
        for channel in range(6):
            angle = torch.tensor(position / 10000 ** (2 * (channel // 2) / 6), dtype=torch.float64)
            expected = angle.cos() if channel % 2 else angle.sin()
            assert table[position, channel].item() == pytest.approx(expected.item(), abs=1e-7)


def test_flat_image_is_as_exact_as_the_reference():
    # 1 / standard deviation is at its largest, 316, where an image is flat
    model = small_model(img_size=32).eval()
    x = torch.full((1, 3, 32, 32), 2.6)
    expected = t2t_vit({k: v.double() for k, v in model.state_dict().items()}, x.double(), 4)[1]
    torch.testing.assert_close(model(x).double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('token_type', ['performer', 'transformer'])
@pytest.mark.parametrize('train', [False, True])
def test_a_batch_in_parts_is_the_batch(monkeypatch, token_type, train):
    module = TokensToToken(token_type, token_drop_rate=0., dtype=torch.float64).train(train)
    x = torch.randn(5, 3, 30, 41, dtype=torch.float64)

    def results(tokens_per_thread):
        monkeypatch.setattr(tokens_to_token_module, 'TOKENS_PER_THREAD', tokens_per_thread)
        parts = []
        monkeypatch.setattr(module, '_forward', lambda x: parts.append(len(x)) or TokensToToken._forward(module, x))
        module.zero_grad()
        out = module(x)
        out.square().sum().backward()
        return parts, [out.detach()] + [p.grad.clone() for p in module.parameters()]

    monkeypatch.setattr(tokens_to_token_module, 'is_observed', lambda *modules: False)  # by the counting above
    (whole, expected), (parts, actual) = results(2 ** 20), results(70)
    assert whole == [5] and len(parts) > 1 and sum(parts) == 5
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('token_type', TOKEN_TYPES)
def test_reparameterized_model_gives_the_same_logits(token_type):
    model = small_model(token_type, dtype=torch.float64).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    folded = reparameterize_model(model)
    x = torch.randn(2, 3, 56, 56, dtype=torch.float64)
    torch.testing.assert_close(folded(x), t2t_vit(state, x, 4)[1], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    if token_type != 'convolution':
        assert 'tokens_to_token.attention1.norm1.weight' not in folded.state_dict()
        step = folded.tokens_to_token.attention1
        with torch.no_grad():
            torch.testing.assert_close(torch.jit.script(folded)(x), folded(x), rtol=1e-9, atol=1e-9)
            fast = step(x)
            hook = step.norm1.register_forward_hook(lambda *args: None)  # called as a module, its output is the same
            torch.testing.assert_close(step(x), fast, rtol=1e-9, atol=1e-9)
            hook.remove()
        logits = folded.bfloat16()(x.bfloat16())
        assert logits.isfinite().all()


@pytest.mark.parametrize('regime', ['normal', 'large_norm'])
@pytest.mark.parametrize('gain', [1, 3, 10])
@pytest.mark.parametrize('mode', ['float16 autocast', 'bfloat16 autocast', 'bfloat16'])
def test_half_precision_stays_in_range(load_golden, golden_images, rel_error, regime, gain, mode):
    model = load_golden(timm.create_model('t2t_vit_7'), 't2t_vit_7', regime)
    with torch.no_grad():
        for attention in (model.tokens_to_token.attention1, model.tokens_to_token.attention2):
            attention.kqv.weight[:2 * attention.dim] *= gain
    images = golden_images(1).float()
    with torch.no_grad():
        expected = model.double()(images.double())
    model.float()
    dtype = torch.float16 if 'float16 ' in mode and 'b' not in mode.split()[0] else torch.bfloat16
    if 'autocast' in mode:
        with torch.autocast('cpu', dtype=dtype):
            logits = model(images)
    else:
        logits = model.to(dtype)(images.to(dtype))
    logits.float().sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    if mode == 'float16 autocast' and regime == 'normal' and gain == 1:
        assert rel_error(logits.detach().double(), expected) < 1e-2


def test_written_gradients_are_those_of_the_modules():
    layer = TokenPerformer(3, kernel_size=7, stride=4, padding=2, drop=0.).double().train()
    x = torch.randn(2, 3, 40, 36, dtype=torch.float64)

    def gradients():
        out = layer(x)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), layer.parameters())]

    written = gradients()
    layer.dp.register_forward_hook(lambda *args: None)  # so that the modules are called
    layer.mlp[1].register_forward_hook(lambda *args: None)
    for ours, theirs in zip(written, gradients(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
