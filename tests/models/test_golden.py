"""Numbers equal to the published implementation's (golden outputs, made in float64 from float32 weights)."""
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

DATA = Path(__file__).parents[1] / 'data'
CASES = ['t2t_vit_7.normal', 't2t_vit_7.large_norm', 't2t_vit_dense.normal', 't2t_vit_t_14.normal']


@pytest.fixture(params=CASES)
def golden(request, load_golden, golden_images):
    """(model in float64, images, golden outputs, golden gradient norms) of a case."""
    architecture, regime = request.param.split('.')
    outputs = np.load(DATA / f'{request.param}.npz')
    model = load_golden(timm.create_model(architecture), architecture, regime).double()
    norms = json.loads((DATA / 'grad_norms.json').read_text())[request.param]
    return model, golden_images(len(outputs['logits'])), outputs, norms


@pytest.mark.parametrize('class_token_only', [True, False])
def test_logits_and_gradients(golden, class_token_only, rel_error):
    model, images, outputs, norms = golden
    model.class_token_only = class_token_only
    logits = model(images)
    assert rel_error(logits.detach(), outputs['logits']) < 1e-9
    probe = torch.from_numpy(np.random.RandomState(7).standard_normal(tuple(logits.shape)))
    (logits * probe).sum().backward()
    assert {name for name, _ in model.named_parameters()} == set(norms)
    for name, parameter in model.named_parameters():
        assert parameter.grad.norm().item() == pytest.approx(norms[name], rel=1e-9), name


@torch.no_grad()
def test_tokens_and_pre_logits(golden, rel_error):
    model, images, outputs, _ = golden
    features = model.forward_features(images)
    assert rel_error(model.forward_head(features, pre_logits=True), outputs['pre_logits']) < 1e-9
    tokens = model.tokens_to_token(images).flatten(2).transpose(1, 2)
    assert rel_error(tokens[:, ::7], outputs['tokens_every_7th']) < 1e-9


@torch.no_grad()
def test_float32(golden, rel_error):
    model, images, outputs, _ = golden
    assert rel_error(model.float()(images.float()), outputs['logits']) < 1e-5


@torch.no_grad()
def test_eager_equations_without_fast_paths(golden, rel_error):
    # a hook on a module makes the layer read as the equations do: unfold, norm, linear
    model, images, outputs, _ = golden
    calls = []
    for name, module in model.named_modules():
        if name.startswith('tokens_to_token.') and isinstance(module, (torch.nn.Linear, torch.nn.LayerNorm)):
            module.register_forward_hook(lambda *args, name=name: calls.append(name))
    assert rel_error(model(images), outputs['logits']) < 1e-9
    assert sum('norm1' in name for name in calls) == 2 and 'tokens_to_token.project' in calls


def test_every_published_layout(layouts):
    for architecture, layout in layouts.items():
        model = timm.create_model(architecture, device='meta')
        state = model.state_dict()
        parameters = dict(model.named_parameters())
        assert {k: list(v.shape) for k, v in state.items()} == layout['state_dict']
        assert sorted(k for k in state if k not in parameters) == sorted(layout['not_trained'])
        assert sum(p.numel() for p in parameters.values()) == layout['parameters']


@torch.no_grad()
@pytest.mark.slow
def test_every_architecture_equals_the_published_code(load_golden, golden_images, rel_error):
    # float64 logits of the published implementation for weights and images of the golden generator
    published = np.load(DATA / 'published_logits.npz')
    assert len(published.files) == 15
    for architecture in published.files:
        model = load_golden(timm.create_model(architecture), architecture).double()
        logits = model(golden_images(1, model.img_size[0]))[0]
        assert rel_error(logits, published[architecture]) < 1e-9, architecture
