"""Numbers equal to the published implementation's (golden outputs, made in float64 from float32 weights)."""
import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from reference import tokens_to_token

DATA = Path(__file__).parents[1] / 'data'
NORMS = json.loads((DATA / 'grad_norms.json').read_text())
PUBLISHED = np.load(DATA / 'published_logits.npz')
FLAT = np.load(DATA / 'flat.npz')
FAST = ('t2t_vit_7.normal', 't2t_vit_7.large_norm', 't2t_vit_dense.normal', 't2t_vit_t_14.normal')  # outputs in files
CASES = [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in NORMS if case not in FAST)]
FLAT_CASES = sorted({key.rsplit('.', 2)[0] for key in FLAT.files})


@pytest.fixture(scope='module', params=CASES)
def golden(request, golden_model):
    """(case, model in float64)."""
    return request.param, golden_model(*request.param.split('.'), dtype=torch.float64)


def test_every_published_architecture_is_here(layouts):
    assert {case.split('.')[0] for case in NORMS} == set(PUBLISHED.files) == set(layouts)
    assert len(layouts) == 15


def test_logits_and_gradients(golden, fused, golden_images, rel_error):
    case, model = golden
    model.zero_grad()
    logits = model(golden_images(2, model.patch_embed.img_size[0]))
    if case in FAST:
        assert rel_error(logits.detach(), np.load(DATA / f'{case}.npz')['logits']) < 1e-9
    probe = torch.from_numpy(np.random.RandomState(7).standard_normal(tuple(logits.shape)))
    (logits * probe).sum().backward()
    norms = NORMS[case]
    trained = {official(name): p for name, p in model.named_parameters()}
    assert set(trained) == set(norms)
    for name, parameter in trained.items():
        assert parameter.grad.norm().item() == pytest.approx(norms[name], rel=1e-9), name


def official(name):
    return re.sub(r'^patch_embed\.', 'tokens_to_token.', name)


def tokens_and(model, call, images):
    """Return the tokens (batch, N, C) that the blocks get in a call with the images, and what the call returns."""
    tokens = []
    with model.patch_embed.register_forward_hook(lambda module, args, output: tokens.append(output)):
        output = call(images)
    return tokens[0], output


@pytest.fixture(scope='module')
def outputs(golden, golden_images):
    """(images, golden outputs for them by name) of a case."""
    case, model = golden
    if case in FAST:
        return golden_images(2), dict(np.load(DATA / f'{case}.npz'))
    images = golden_images(1, model.patch_embed.img_size[0])
    with torch.no_grad():  # of the tokens there is the second opinion alone
        tokens, _ = tokens_to_token(model.state_dict(), images)
    return images, dict(logits=PUBLISHED[case.split('.')[0]][None], tokens=tokens)


@torch.no_grad()
def test_logits_with_the_fewest_launches(golden, outputs, launch_bound, rel_error):
    _, model = golden
    images, expected = outputs
    assert rel_error(model(images), expected['logits']) < 1e-9


@torch.no_grad()
def test_tokens_pre_logits_and_logits(golden, outputs, fused, rel_error):
    _, model = golden
    images, expected = outputs
    tokens, features = tokens_and(model, model.forward_features, images)
    pre_logits = model.forward_head(features, pre_logits=True)
    actual = dict(
        pre_logits=pre_logits, logits=model.head(pre_logits), tokens=tokens, tokens_every_7th=tokens[:, ::7])
    for name, output in expected.items():
        assert rel_error(actual[name], output) < 1e-9, name


@torch.no_grad()
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize('golden', FLAT_CASES, indirect=True)
def test_images_with_flat_regions(golden, dtype, tolerance, golden_weights, rel_error):
    case, model = golden
    model = copy.deepcopy(model).to(dtype)
    images = golden_weights.flat_images(224)
    assert {key for key in FLAT.files if key.startswith(f'{case}.')} == {
        f'{case}.{name}.{output}' for name in images for output in ('logits', 'tokens_every_7th')}
    for name, image in images.items():
        image = torch.from_numpy(image).to(dtype)
        tokens, logits = tokens_and(model, model, image)
        assert rel_error(logits, FLAT[f'{case}.{name}.logits']) < tolerance, name
        assert rel_error(tokens[:, ::7], FLAT[f'{case}.{name}.tokens_every_7th']) < tolerance, name


@torch.no_grad()
@pytest.mark.parametrize('golden', FAST, indirect=True)
def test_float32(golden, golden_images, rel_error):
    case, model = golden
    model = copy.deepcopy(model).float()
    assert rel_error(model(golden_images(2).float()), np.load(DATA / f'{case}.npz')['logits']) < 1e-5


def test_every_published_layout(layouts):
    for architecture, layout in layouts.items():
        model = timm.create_model(architecture, device='meta')
        state = model.state_dict()
        trained = dict(model.named_parameters())
        assert {official(k): list(v.shape) for k, v in state.items()} == layout['state_dict']
        assert sorted(official(k) for k in state if k not in trained) == sorted(layout['not_trained'])
        assert sum(p.numel() for p in trained.values()) == layout['parameters']
