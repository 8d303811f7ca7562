"""Logits and gradients on images with flat regions, in every precision, against the equations in float64."""
import copy
from contextlib import nullcontext
from functools import cache

import numpy as np
import pytest
import torch
from flat import flat_images
from rounding import TF32

from t2t_timm import set_fused

MODELS = {  # shallow: what flat regions are hard for is the tokens-to-token module
    'performer': ('t2t_vit_7', dict(img_size=64, depth=2)),
    'performer, grey': ('t2t_vit_7', dict(img_size=64, depth=2, in_chans=1)),
    'transformer': ('t2t_vit_t_14', dict(img_size=64, depth=2)),
}
MODES = {  # dtype of the model, what it runs in, tolerance of the logits
    'float64': (torch.float64, nullcontext, 1e-9),
    'float32': (torch.float32, nullcontext, 1e-5),
    'TF32 convolutions': (torch.float32, TF32, 5e-3),
    'TF32 convolutions and products': (torch.float32, lambda: TF32(products=True), 1e-2),
    'float16 autocast': (torch.float32, lambda: torch.autocast('cpu', torch.float16), 1e-2),
    'bfloat16 autocast': (torch.float32, lambda: torch.autocast('cpu', torch.bfloat16), 6e-2),
    'bfloat16': (torch.bfloat16, nullcontext, 6e-2),
}


@pytest.fixture(scope='module', params=MODELS)
def case(request, golden_model):
    """(function that makes the model in a dtype, images by name, function that gives logits in float64)."""
    architecture, kwargs = MODELS[request.param]
    return make_case(golden_model(architecture, num_classes=100, **kwargs))


@pytest.fixture(scope='module')
def large_norm(golden_model):
    """The same for large keys and queries."""
    return make_case(golden_model('t2t_vit_7', 'large_norm', num_classes=100, img_size=64, depth=2))


def make_case(model):
    images = flat_images(64, model.in_chans)

    def make(dtype):
        return copy.deepcopy(model).to(dtype)

    @cache
    def logits_in_float64(dtype):
        """What the equations give for weights and images rounded to a dtype."""
        with set_fused(False):
            return make(dtype).double()(torch.cat([*images.values()]).to(dtype).double())
    return make, images, logits_in_float64


def errors_of(case, mode):
    """Largest error of the logits of each image, over the largest logit."""
    make, images, logits_in_float64 = case
    dtype, context, _ = MODES[mode]
    with context() as counter:
        logits = make(dtype)(torch.cat([*images.values()]).to(dtype))
    assert not isinstance(counter, TF32) or counter.count >= 2  # some products were rounded
    expected = logits_in_float64(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    return dict(zip(images, relative_errors(logits, expected).tolist(), strict=True))


def relative_errors(logits, expected):
    return (logits.double() - expected).abs().amax(dim=1) / expected.abs().amax(dim=1)


@torch.no_grad()
@pytest.mark.parametrize('mode', MODES)
def test_logits(case, mode):
    errors = errors_of(case, mode)
    worst = max(errors, key=errors.get)
    print(f'{mode}: {errors[worst]:.1e} at {worst}')
    assert errors[worst] < MODES[mode][2], worst


@torch.no_grad()
@pytest.mark.parametrize('mode', [mode for mode in MODES if mode != 'float64'])
def test_large_keys_and_queries_keep_the_epsilon(large_norm, mode):
    """Where the 1e-8 of the Performer's denominator decides the logits, low precision has to give them too."""
    errors = errors_of(large_norm, mode)
    worst = max(errors, key=errors.get)
    print(f'{mode}: {errors[worst]:.1e} at {worst}')
    assert errors[worst] < MODES[mode][2], worst


@torch.no_grad()
def test_the_epsilon_decides_where_keys_and_queries_are_large(large_norm):
    """Or the test above would prove nothing."""
    make, images, logits_in_float64 = large_norm
    without = make(torch.float64)
    for step in (without.patch_embed.attention1, without.patch_embed.attention2):
        step.eps = 1e-20
    with set_fused(False):
        errors = relative_errors(without(torch.cat([*images.values()])), logits_in_float64(torch.float32))
    print(f'without the epsilon: {errors.median():.1e}')
    assert errors.median() > 2 * MODES['bfloat16'][2]


def gradients(model, x, probe):
    model.zero_grad()
    (model(x).double() * probe).sum().backward()
    return {name: p.grad.double() for name, p in model.named_parameters()}


@pytest.fixture(scope='module')
def make_gradient_case(golden_model):
    """A function that gives (model, its images by name, their gradients in float64, the probe)."""
    def make_gradient_case(name, regime='normal'):
        architecture, kwargs = MODELS[name]
        kwargs = dict(kwargs, img_size=40, depth=1, embed_dim=96, num_heads=2)
        model = golden_model(architecture, regime, num_classes=10, **kwargs)
        images = flat_images(40, model.in_chans)
        probe = torch.from_numpy(np.random.RandomState(7).standard_normal((1, 10)))
        reference = copy.deepcopy(model).double()
        with set_fused(False):
            return model, images, {name: gradients(reference, image, probe) for name, image in images.items()}, probe
    return make_gradient_case


@pytest.fixture(scope='module', params=MODELS)
def gradient_case(request, make_gradient_case):
    return make_gradient_case(request.param)


@pytest.fixture(scope='module')
def large_norm_gradients(make_gradient_case):
    return make_gradient_case('performer', 'large_norm')


def worst_gradient(case, mode):
    """Largest error of a gradient over its largest magnitude, with the image and the parameter."""
    model, images, expected, probe = case
    dtype, context, _ = MODES[mode]
    model, worst = copy.deepcopy(model).to(dtype), (0., '', '')
    for name, image in images.items():
        with context():
            actual = gradients(model, image.to(dtype), probe)
        worst = max(worst, *(
            (((actual[k] - v).abs().max() / v.abs().max()).item(), name, k) for k, v in expected[name].items()))
    print(f'{mode}: {worst[0]:.1e} at {worst[1]} of {worst[2]}')
    return worst


@pytest.mark.parametrize('mode, tolerance', [('float64', 1e-9), ('float32', 2e-5), ('TF32 convolutions', 3e-3)])
def test_gradients(gradient_case, mode, tolerance):
    worst = worst_gradient(gradient_case, mode)
    assert worst[0] < tolerance, worst


# rounding what the map to keys and queries multiplies to TF32 is 1e-2 in the equations too: docs/development.md
@pytest.mark.parametrize('mode, tolerance', [('float64', 1e-9), ('float32', 2e-5), ('TF32 convolutions', 2e-2)])
def test_gradients_of_large_keys_and_queries(large_norm_gradients, mode, tolerance):
    worst = worst_gradient(large_norm_gradients, mode)
    assert worst[0] < tolerance, worst
