"""Fixtures that all tests share."""
import gc
import json
import os
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest  # and no torch: a process that only starts workers loads this file too

DATA = Path(__file__).parent / 'data'

# two cores in all: of the one process, or one for each of two workers, where threads that wait for each other would
# take ten times as long; started processes read it too, and workers that of the process that starts them
os.environ['OMP_NUM_THREADS'] = (
    '1' if 'PYTEST_XDIST_WORKER' in os.environ else os.environ.get('OMP_NUM_THREADS', '2'))
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # nothing may load from the real Hub; loopback tests start processes


def pytest_collection_modifyitems(items):
    """Run the fast tests of all files first; of several workers, each runs the fast ones of a file first.

    Those take the files that have slow tests first, and the others at the end, so that none ends long before the rest.
    """
    timm_version = metadata.version('timm')
    installed = tuple(map(int, timm_version.split('.')[:3]))
    for item in items:
        for mark in item.iter_markers('timm'):
            if installed < tuple(map(int, mark.args[0].split('.'))):
                reason = f'needs timm {mark.args[0]}, not {timm_version}: pip install --upgrade timm'
                item.add_marker(pytest.mark.skip(reason=reason))
    slow = {item: item.get_closest_marker('slow') is not None for item in items}
    long = {item.path for item in items if slow[item]} if 'PYTEST_XDIST_WORKER' in os.environ else {}
    items.sort(key=lambda item: (bool(long) and item.path not in long, slow[item]))


def pytest_collection_finish():
    """Have torch take its threads, and Python look for garbage less often and not in what is imported.

    Looking there took a tenth of the time.
    """
    import torch
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 20, 20)


@pytest.fixture(scope='session')
def timm_scripts():
    """The checkout of pytorch-image-models whose programs are run; they are not in timm's wheel."""
    if 'TIMM_SCRIPTS' not in os.environ:
        pytest.skip('TIMM_SCRIPTS names no pytorch-image-models checkout: set it to the path of one')
    return Path(os.environ['TIMM_SCRIPTS'])


@pytest.fixture(scope='session')
def heldout(tmp_path_factory):
    """The 1,000 digits that the embedded model was not trained on, one folder per digit."""
    from t2t_timm.digits import extract_heldout
    return extract_heldout(tmp_path_factory.mktemp('digits') / 'heldout')


@pytest.fixture(scope='session')
def golden_weights():
    """The generator of deterministic weights and images behind the golden outputs."""
    import golden_weights
    return golden_weights


@pytest.fixture(scope='session')
def layouts():
    """Names, shapes and parameter counts of the published checkpoints, by architecture."""
    return json.loads((DATA / 'state_dict_layout.json').read_text())


@pytest.fixture(scope='session')
def golden_model(golden_weights):
    """A function that makes a model with deterministic weights, rounded to float32, in evaluation mode."""
    import timm
    import torch

    from t2t_timm.layers import sinusoidal_pos_embed

    def golden_model(architecture, regime='normal', dtype=torch.float32, **kwargs):
        model = timm.create_model(architecture, device='meta', **kwargs)  # draws no weights that would be replaced
        official = {k.replace('patch_embed.', 'tokens_to_token.', 1): v.shape for k, v in model.state_dict().items()}
        state = golden_weights.deterministic_state(official, regime)
        state = {k: torch.from_numpy(v).float().to(dtype) for k, v in state.items()}
        state['pos_embed'] = sinusoidal_pos_embed(*model.pos_embed.shape[1:], dtype=dtype)
        model.load_state_dict(state, assign=True)
        return model.eval()
    return golden_model


@pytest.fixture(scope='session')
def golden_images(golden_weights):
    """A function that makes deterministic float64 images (batch, 3, size, size)."""
    import torch
    return lambda batch, size=224: torch.from_numpy(golden_weights.deterministic_images(batch, size))


@pytest.fixture(params=[True, False], ids=['fused', 'equations'])
def fused(request):
    """Run a test on both sides of the switch."""
    from t2t_timm import set_fused
    with set_fused(request.param):
        yield request.param


@pytest.fixture(params=[False, True], ids=['not reentrant', 'reentrant'])
def reentrant(request):
    """Run a test with both kinds of gradient checkpoints that timm can make."""
    from timm.layers import set_reentrant_ckpt, use_reentrant_ckpt
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(request.param)
    yield
    set_reentrant_ckpt(before)


@pytest.fixture
def called():
    """A function that gives the names of the submodules that a call of a model calls, in their order.

    Unlike hooks, and unlike a `__call__` of its own, it does not make the model call more of them.
    """
    from torch.nn import Module

    def called(model, *args):
        names, modules = {id(m): name for name, m in model.named_modules()}, []

        def profile(frame, event, _):
            if event == 'call' and frame.f_code is Module.__call__.__code__:
                modules.append(frame.f_locals['self'])
        before = sys.getprofile()
        sys.setprofile(profile)
        try:
            model(*args)
        finally:
            sys.setprofile(before)
        return [names[id(m)] for m in modules if id(m) in names]
    return called


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
    import timm
    import torch
    try:
        timm.create_model('test_vit', features_only=True, feature_cls='fx', out_indices=(1,))
    except TypeError as e:
        pytest.skip(f"fx of torch {torch.__version__} cannot trace timm's attention; install a newer torch: {e}")
