"""Fixtures that all tests share."""
import gc
import os
import sys
from importlib import metadata
from pathlib import Path

import pytest  # and no torch: a process that only starts workers loads this file too

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


@pytest.fixture
def mistake(capsys):
    """A function that runs a command that must fail, and gives what it says."""
    from t2t_timm.cli import main

    def mistake(*argv):
        assert main([str(arg) for arg in argv]) == 1
        out, err = capsys.readouterr()
        assert out == '' and 'Traceback' not in err
        return err
    return mistake


@pytest.fixture
def file_limit():
    """A function that lets no file grow beyond so many bytes, as on a full disk; without a number, any file."""
    resource = pytest.importorskip('resource', reason='Windows limits no files: run it on Linux or macOS')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def file_limit(size=limits[0]):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    yield file_limit
    file_limit()


@pytest.fixture
def no_network(monkeypatch):
    """Refuse every connection."""
    for name in ('socket.socket.connect', 'socket.getaddrinfo'):
        monkeypatch.setattr(name, lambda *args, **kwargs: pytest.fail('the network was used'))


@pytest.fixture
def photos(tmp_path):
    """A function that makes a folder of class folders with an image each."""
    from PIL import Image

    def photos(*names):
        for name in names:
            (tmp_path / 'photos' / name).mkdir(parents=True)
            Image.new('RGB', (4, 4)).save(tmp_path / 'photos' / name / 'x.png')
        return tmp_path / 'photos'
    return photos


@pytest.fixture(scope='session')
def embedded_folder(tmp_path_factory):
    """Folder that convert writes of the weights inside the package."""
    from t2t_timm.hub.convert import convert
    from t2t_timm.weights.manifest import weight_entry
    file = weight_entry('test_t2t_vit.mnist').path
    return str(convert(file, 'test_t2t_vit.mnist', tmp_path_factory.mktemp('embedded') / 'model'))


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
def fx_traces_attention():
    """Skip where fx cannot trace timm's own ViTs: there timm's attention cannot be traced in ours either."""
    import timm
    import torch
    try:
        timm.create_model('test_vit', features_only=True, feature_cls='fx', out_indices=(1,))
    except TypeError as e:
        pytest.skip(f"fx of torch {torch.__version__} cannot trace timm's attention; install a newer torch: {e}")
