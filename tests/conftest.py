"""Fixtures that all tests share."""
import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

DATA = Path(__file__).parent / 'data'
pytest_plugins = ['loopback']

torch.set_num_threads(2)
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # nothing may load from the real Hub; loopback tests start processes


def pytest_collection_modifyitems(items):
    """Run the fast tests first."""
    items.sort(key=lambda item: item.get_closest_marker('slow') is not None)


@pytest.fixture(scope='session')
def timm_scripts():
    """The checkout of pytorch-image-models whose programs are run; they are not in timm's wheel."""
    if 'TIMM_SCRIPTS' not in os.environ:
        pytest.skip('TIMM_SCRIPTS names no pytorch-image-models checkout')
    return Path(os.environ['TIMM_SCRIPTS'])


@pytest.fixture(scope='session')
def golden_weights():
    """The generator of deterministic weights and images behind the golden outputs."""
    spec = importlib.util.spec_from_file_location('golden_weights', DATA / 'golden_weights.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope='session')
def layouts():
    """Names, shapes and parameter counts of the published checkpoints, by architecture."""
    return json.loads((DATA / 'state_dict_layout.json').read_text())


@pytest.fixture(scope='session')
def load_golden(golden_weights, layouts):
    """A function that loads a model with deterministic weights; strict, so that the layout must match."""
    def load(model, architecture, regime='normal'):
        state = golden_weights.deterministic_state(layouts[architecture]['state_dict'], regime)
        state = {k: torch.from_numpy(v).float() for k, v in state.items()}
        model.load_state_dict(dict(state, pos_embed=model.pos_embed), strict=True)
        return model.eval()
    return load


@pytest.fixture(scope='session')
def golden_images(golden_weights):
    """A function that makes deterministic float64 images (batch, 3, size, size)."""
    return lambda batch, size=224: torch.from_numpy(golden_weights.deterministic_images(batch, size))


@pytest.fixture(scope='session')
def rel_error():
    """A function that gives the largest difference over the largest magnitude expected."""
    def rel_error(actual, expected):
        actual, expected = np.asarray(actual), np.asarray(expected)
        return np.abs(actual - expected).max() / np.abs(expected).max()
    return rel_error


@pytest.fixture(scope='session')
def fx_traces_attention():
    """Skip where fx cannot trace timm's own ViTs: there timm's attention cannot be traced in ours either."""
    import timm  # not above: huggingface_hub reads HF_HUB_OFFLINE as it is imported
    try:
        timm.create_model('test_vit', features_only=True, feature_cls='fx', out_indices=(1,))
    except TypeError as e:
        pytest.skip(f"fx of torch {torch.__version__} cannot trace timm's attention: {e}")
