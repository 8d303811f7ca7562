"""timm's own tests over this package's models: `python tools/timm_suite.py [PYTEST ARGS]`, or `make timm-suite`.

Downloads the source distribution of the installed timm, whose tests/ are not in the wheel, and runs them with this file
as a pytest plugin. No test is edited:

- `list_models`, which timm's test modules call as they are imported, answers with our names alone, as if they stood in
  timm's lists of plain ViTs (NON_STD_FILTERS) and of models with forward_intermediates (FEAT_INTER_FILTERS);
- tests that take a model from a list of their own get a case with ours (EXTRA_CASES);
- what does not take one of our models is deselected; what needs the network is skipped, and pytest lists why.
"""
import fnmatch
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import timm
import timm.models

OURS = ('t2t_vit*', 'test_t2t_vit*')
MODULES = ('t2t_vit', 't2t_vit_dense')
PLAIN_VIT = 'vit_*'  # the entry by which NON_STD_FILTERS is recognised
TEST_FILES = ('test_models.py', 'test_input_conv.py', 'test_model_input.py', 'test_checkpoint_loading.py')
EXTRA_CASES = {
    'test_default_resize_hub_roundtrip': [
        ('test_t2t_vit', {}, 56, 84), ('t2t_vit_dense', {}, 64, 96), ('t2t_vit_t_14', {'depth': 1}, 64, 96)],
    'test_export_tracks_reset_classifier_structure': [
        ('test_t2t_vit', {}, 'avg', None), ('test_t2t_vit', {'global_pool': 'avg'}, 'token', None)],
}

_list_models = timm.list_models


def _is_ours(name) -> bool:
    return isinstance(name, str) and any(fnmatch.fnmatch(name, pattern) for pattern in OURS)


def _list_ours(filter='', module='', exclude_filters='', **kwargs):
    if PLAIN_VIT in exclude_filters:  # asks for all but plain ViTs
        return []
    if filter and PLAIN_VIT not in filter:
        return [n for n in _list_models(filter, module, exclude_filters=exclude_filters, **kwargs) if _is_ours(n)]
    names = _list_models(list(OURS), exclude_filters=exclude_filters, **kwargs)
    if not module or isinstance(module, str):
        return names
    return [n for n in names if timm.models.model_entrypoint(n.split('.')[0]).__module__.split('.')[-1] in MODULES]


def pytest_configure(config):
    """Put our list in the place of timm's before a test module imports it."""
    timm.list_models = timm.models.list_models = _list_ours
    timm.list_pretrained = timm.models.list_pretrained = lambda *args, **kw: _list_ours(*args, pretrained=True, **kw)


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc):
    """Add our cases to tests that parametrize over models of their own."""
    for mark in metafunc.definition.iter_markers('parametrize'):
        for case in EXTRA_CASES.get(metafunc.function.__name__, ()):
            if case not in mark.args[1]:
                mark.args[1].append(case)


def pytest_collection_modifyitems(config, items):
    """Keep the tests that take one of our models; skip, with the reason, those that need the network."""
    kept, dropped = [], []
    for item in items:
        params = item.callspec.params.values() if hasattr(item, 'callspec') else ()
        name = next((p for p in params if _is_ours(p)), None)
        (kept if name else dropped).append(item)
        if name and item.originalname == 'test_model_inference':
            item.add_marker(pytest.mark.skip(reason="reads reference tensors from timm's own Hub repos"))
        elif name and 'pretrained' in item.originalname and not name.startswith('test_'):
            item.add_marker(pytest.mark.skip(reason='would download published weights; the loopback tests cover it'))
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept


def main() -> int:
    """Fetch timm's tests and run them; return pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        print(f'Fetching the source distribution of timm {timm.__version__} for its tests ...', flush=True)
        pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--no-binary', 'timm', '--dest', folder]
        subprocess.run([*pip, f'timm=={timm.__version__}'], check=True)
        tests = Path(folder) / 'tests'
        tests.mkdir()
        with tarfile.open(next(Path(folder).glob('timm-*.tar.gz'))) as sdist:
            for member in sdist.getmembers():
                name = Path(member.name)
                if member.isfile() and (name.parent.name == 'tests' or name.parts[1:] == ('pyproject.toml',)):
                    target = tests / name.name if name.parent.name == 'tests' else Path(folder) / name.name
                    target.write_bytes(sdist.extractfile(member).read())
        env = dict(os.environ, PYTHONPATH=str(Path(__file__).parent), TIMEOUT='600', HF_HUB_OFFLINE='1')
        files = [f'tests/{name}' for name in TEST_FILES]
        command = [sys.executable, '-m', 'pytest', '-q', '-rs', '-p', Path(__file__).stem, *sys.argv[1:], *files]
        return subprocess.run(command, cwd=folder, env=env).returncode


if __name__ == '__main__':
    sys.exit(main())
