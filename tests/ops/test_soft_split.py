"""Soft split, LayerNorm and linear map in fewer steps against the three in float64, on flat images above all."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import soft_split as reference_soft_split

from t2t_timm.ops import soft_split_linear, soft_split_norm_linear

FIRST, SECOND = (7, 4, 2), (3, 2, 1)


def parameters(in_chans, kernel_size, dim=12):
    """Gain and bias of a LayerNorm, weight and bias of a linear map, in float64 that float32 holds exactly."""
    generator = torch.Generator().manual_seed(0)
    n = in_chans * kernel_size ** 2
    norm_weight, norm_bias, weight, bias = (
        torch.randn(shape, generator=generator) for shape in ((n,), (n,), (dim, n), (dim,)))
    return [t.double().requires_grad_() for t in (1 + 0.1 * norm_weight, 0.1 * norm_bias, weight / n ** 0.5, bias)]


def reference(x, norm_weight, norm_bias, weight, bias, split):
    """Return linear(norm(soft_split(x))) with the deviations formed first."""
    u, _ = reference_soft_split(x, *split)
    u = u - u.mean(dim=-1, keepdim=True)
    u = u / torch.sqrt(u.square().mean(dim=-1, keepdim=True) + 1e-5) * norm_weight + norm_bias
    return u @ weight.T + bias


def run(x, args, split):
    norm_weight, norm_bias, weight, bias = args
    norm = SimpleNamespace(weight=norm_weight, bias=norm_bias, eps=1e-5, normalized_shape=weight.shape[1:])
    return soft_split_norm_linear(x, norm, SimpleNamespace(weight=weight, bias=bias), split)


def errors(actual, expected):
    """Largest difference of each tensor over its largest magnitude."""
    pairs = zip(actual, expected, strict=True)
    return [((a - e).abs().max() / e.abs().max().clamp(min=1e-30)).item() for a, e in pairs]


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(3, 40),
    width=st.integers(3, 40),
    in_chans=st.sampled_from([1, 2, 3, 4, 5, 32, 40]),  # images, and maps of many channels
    batch=st.integers(1, 3),
    split=st.sampled_from([
        FIRST, SECOND, (5, 4, 1), (6, 4, 1), (6, 4, 2), (5, 3, 2), (4, 4, 0), (3, 1, 1), (7, 5, 2), (8, 4, 2)]),
    flat=st.booleans(),
    image_grad=st.booleans(),
)
def test_any_size_any_geometry(height, width, in_chans, batch, split, flat, image_grad):
    height, width = max(height, split[0]), max(width, split[0])
    generator = torch.Generator().manual_seed(height * 41 + width)
    x = torch.randn(batch, in_chans, height, width, generator=generator, dtype=torch.float64)
    if flat:
        x = 2.2 + 1e-3 * x
    x.requires_grad_(image_grad)
    args = parameters(in_chans, split[0])
    out, expected = run(x, args, split), reference(x, *args, split)
    inputs, probe = args + [x] * image_grad, torch.randn_like(out)
    actual = [out, *torch.autograd.grad(out, inputs, probe)]
    expected = [expected, *torch.autograd.grad(expected, inputs, probe)]
    # beside 1 / std, up to 316, and its square in the image's gradient
    assert max(errors(actual, expected)) < (1e-8 if flat else 1e-9)


@pytest.mark.parametrize('split, in_chans, image_grad', [
    (FIRST, 3, False), (FIRST, 3, True), (SECOND, 32, True), (SECOND, 64, True)])
def test_what_is_kept_for_the_gradient(split, in_chans, image_grad):
    """Patches of images once, or twice where the image needs a gradient; of many channels, none."""
    x = torch.randn(2, in_chans, 48, 48, requires_grad=image_grad)
    args = [t.detach().float().requires_grad_() for t in parameters(in_chans, split[0], dim=8)]
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        out = run(x, args, split)
    num_unfolded = out.shape[0] * out.shape[1] * in_chans * split[0] ** 2
    large = [n for n in kept.values() if n >= num_unfolded]
    assert kept and large == [num_unfolded] * (0 if split == SECOND else 1 + image_grad)


@pytest.mark.parametrize('split', [FIRST, SECOND])
@pytest.mark.parametrize('bias', [False, True])
def test_linear_of_patches(split, bias):
    x = torch.randn(2, 5, 21, 34, dtype=torch.float64)
    *_, weight, b = parameters(5, split[0])
    u, grid = reference_soft_split(x, *split)
    y = soft_split_linear(x, weight, b if bias else None, split)
    assert y.shape[-2:] == grid
    torch.testing.assert_close(y.flatten(2).transpose(1, 2), F.linear(u, weight, b if bias else None))
