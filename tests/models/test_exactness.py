"""Logits and gradients on images with flat regions, in every precision, against the equations in float64."""
import copy
from contextlib import nullcontext
from functools import cache, partial

import numpy as np
import pytest
import torch
from flat import flat_images
from published import golden_model
from rounding import TF32

from t2t_timm import set_fused

MODELS = {  # architecture, regime of the weights, channels
    'performer': ('t2t_vit_7', 'normal', 3),
    'performer, grey': ('t2t_vit_7', 'normal', 1),
    'performer, large keys and queries': ('t2t_vit_7', 'large_norm', 3),  # the 1e-8 of its denominator decides there
    'transformer': ('t2t_vit_t_14', 'normal', 3),
}
MODES = {  # dtype of the model, what it runs in, tolerance of the logits
    'float64': (torch.float64, nullcontext, 1e-9),
    'float32': (torch.float32, nullcontext, 1e-5),
    'TF32 convolutions': (torch.float32, TF32, 5e-3),
    'TF32 convolutions and products': (torch.float32, partial(TF32, products=True), 1e-2),
    'float16 autocast': (torch.float32, partial(torch.autocast, 'cpu', torch.float16), 1e-2),
    'bfloat16 autocast': (torch.float32, partial(torch.autocast, 'cpu', torch.bfloat16), 6e-2),
    'bfloat16': (torch.bfloat16, nullcontext, 6e-2),
}


def make(name, **kwargs):
    """Make one of MODELS, shallow: what flat regions are hard for is the tokens-to-token module."""
    architecture, regime, in_chans = MODELS[name]
    return golden_model(architecture, regime, in_chans=in_chans, **kwargs)


@pytest.fixture(scope='module', params=MODELS)
def case(request):
    """(model, its images by name, function that gives logits in float64)."""
    model = make(request.param, img_size=64, depth=2, num_classes=100)
    images = flat_images(64, model.in_chans)

    @cache
    def logits_in_float64(dtype):
        """What the equations give for weights and images rounded to a dtype."""
        rounded = copy.deepcopy(model).to(dtype).double()
        with set_fused(False):
            return rounded(torch.cat([*images.values()]).to(dtype).double())
    return model, images, logits_in_float64


@torch.no_grad()
@pytest.mark.parametrize('mode', MODES)
def test_logits(case, mode):
    model, images, logits_in_float64 = case
    dtype, context, tolerance = MODES[mode]
    with context() as counter:
        logits = copy.deepcopy(model).to(dtype)(torch.cat([*images.values()]).to(dtype))
    assert not isinstance(counter, TF32) or counter.count >= 2  # some products were rounded
    expected = logits_in_float64(torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    errors = (logits.double() - expected).abs().amax(dim=1) / expected.abs().amax(dim=1)
    errors = dict(zip(images, errors.tolist(), strict=True))
    worst = max(errors, key=errors.get)
    assert errors[worst] < tolerance, worst


def gradients(model, x, probe):
    model.zero_grad()
    (model(x).double() * probe).sum().backward()
    return {name: p.grad.double() for name, p in model.named_parameters()}


@pytest.fixture(scope='module', params=MODELS)
def gradient_case(request):
    """(name, model, its images by name, their gradients in float64, the probe)."""
    model = make(request.param, img_size=40, depth=1, embed_dim=96, num_heads=2, num_classes=10)
    images = flat_images(40, model.in_chans)
    probe = torch.from_numpy(np.random.RandomState(7).standard_normal((1, 10)))
    wide = copy.deepcopy(model).double()
    with set_fused(False):
        return request.param, model, images, {k: gradients(wide, image, probe) for k, image in images.items()}, probe


@pytest.mark.parametrize('mode, tolerance', [
    ('float64', 1e-9), ('float32', 2e-5), ('TF32 convolutions', 3e-3), ('float16 autocast', 1e-2),
    ('bfloat16 autocast', 0.1)])
def test_gradients(gradient_case, mode, tolerance):
    model_name, model, images, expected, probe = gradient_case
    if 'large' in model_name and mode not in ('float64', 'float32'):
        # rounding what the map to keys and queries multiplies is 1e-2 in the equations too: docs/development.md
        tolerance = {'TF32 convolutions': 2e-2, 'float16 autocast': 4e-2, 'bfloat16 autocast': 0.25}[mode]
    dtype, context, _ = MODES[mode]
    model, worst = copy.deepcopy(model).to(dtype), (0., '', '')
    for name, image in images.items():
        with context():
            actual = gradients(model, image.to(dtype), probe)
        worst = max(worst, *(
            (((actual[k] - v).abs().max() / v.abs().max()).item(), name, k) for k, v in expected[name].items()))
    assert worst[0] < tolerance, worst
