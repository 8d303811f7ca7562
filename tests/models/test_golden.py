"""Numbers equal to the published implementation's (golden outputs, made in float64 from float32 weights)."""
import copy
import json

import numpy as np
import pytest
import timm
import torch
from data.golden_weights import flat_images
from published import DATA, LAYOUTS, golden_model, images, official, rel_error

NORMS = json.loads((DATA / 'grad_norms.json').read_text())
PUBLISHED = np.load(DATA / 'published_logits.npz')
FLAT = np.load(DATA / 'flat.npz')
FAST = ('t2t_vit_7.normal', 't2t_vit_7.large_norm', 't2t_vit_dense.normal', 't2t_vit_t_14.normal')  # outputs in files
CASES = [*FAST, *(pytest.param(case, marks=pytest.mark.slow) for case in NORMS if case not in FAST)]
FLAT_CASES = sorted({key.rsplit('.', 2)[0] for key in FLAT.files})


@pytest.fixture(scope='module', params=CASES)
def golden(request):
    """(case, model in float64)."""
    return request.param, golden_model(*request.param.split('.'), dtype=torch.float64)


def test_every_published_architecture_is_here():
    assert {case.split('.')[0] for case in NORMS} == set(PUBLISHED.files) == set(LAYOUTS)
    assert len(LAYOUTS) == 15


def call(model, images):
    """Return the logits of images, and the tokens and pre-logits on the way to them, by their names in the files."""
    seen = {}
    with model.patch_embed.register_forward_hook(lambda module, args, out: seen.update(tokens_every_7th=out[:, ::7])), \
            model.head.register_forward_hook(lambda module, args, out: seen.update(pre_logits=args[0])):
        return dict(logits=model(images), **seen)


def test_outputs_and_gradients(golden, fused):
    case, model = golden
    size = model.patch_embed.img_size[0]
    x, tolerance = images(2, size, torch.float64), 1e-9
    if case in FAST:
        outputs = call(model, x)
        logits = outputs['logits']
        for name, expected in np.load(DATA / f'{case}.npz').items():
            assert rel_error(outputs[name].detach(), expected) < 1e-9, name
        with torch.no_grad():
            assert rel_error(copy.deepcopy(model).float()(x.float()), logits.detach()) < 1e-5
    else:
        with torch.no_grad():
            assert rel_error(model(images(1, size, torch.float64)), PUBLISHED[case.split('.')[0]][None]) < 1e-9
        if not fused:  # autograd's gradient of the equations whose outputs were just compared, in half the time
            model, x, tolerance = copy.deepcopy(model).float(), x.float(), 2e-5
        logits = model(x)
    model.zero_grad()
    probe = torch.from_numpy(np.random.RandomState(7).standard_normal(tuple(logits.shape)))
    (logits * probe).sum().backward()
    norms = {name: p.grad.double().norm().item() for name, p in model.named_parameters()}
    assert official(norms) == pytest.approx(NORMS[case], rel=tolerance)


@torch.no_grad()
@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize('golden', FLAT_CASES, indirect=True)
def test_images_with_flat_regions(golden, dtype, tolerance):
    case, model = golden
    model = copy.deepcopy(model).to(dtype)
    flat = flat_images(224)
    assert {key for key in FLAT.files if key.startswith(f'{case}.')} == {
        f'{case}.{name}.{output}' for name in flat for output in ('logits', 'tokens_every_7th')}
    for name, image in flat.items():
        image = torch.from_numpy(image).to(dtype)
        outputs = call(model, image)
        for output in ('logits', 'tokens_every_7th'):
            assert rel_error(outputs[output], FLAT[f'{case}.{name}.{output}']) < tolerance, name


def test_every_published_layout():
    for architecture, layout in LAYOUTS.items():
        model = timm.create_model(architecture, device='meta')
        state = model.state_dict()
        trained = dict(model.named_parameters())
        assert official({k: list(v.shape) for k, v in state.items()}) == layout['state_dict']
        assert set(official({k: v for k, v in state.items() if k not in trained})) == set(layout['not_trained'])
        assert sum(p.numel() for p in trained.values()) == layout['parameters']
