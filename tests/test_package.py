"""The wheel and the source distribution are complete, and the wheel works where it alone is installed."""
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

DATA = [
    't2t_timm/weights/manifest.yaml', 't2t_timm/weights/test_t2t_vit.mnist.safetensors', 't2t_timm/digits/heldout.tar',
    't2t_timm/recipes/t2t_vit_14.yaml', 't2t_timm/recipes/test_t2t_vit_mnist.yaml',
    't2t_timm.pth', 't2t_timm.start', '_t2t_timm_autoload.py',
]


@pytest.fixture(scope='module')
def dists(tmp_path_factory):
    """(wheel, sdist), made by python -m build."""
    out = tmp_path_factory.mktemp('dist')
    subprocess.run([sys.executable, '-m', 'build', '--outdir', str(out), str(ROOT)], check=True, capture_output=True)
    return next(out.glob('*.whl')), next(out.glob('*.tar.gz'))


def test_contents(dists):
    wheel, sdist = dists
    names = zipfile.ZipFile(wheel).namelist()
    assert set(DATA) <= set(names)
    assert not [n for n in names if n.startswith(('tests/', 'tools/', '_build_commands'))]
    with tarfile.open(sdist) as tar:
        members = {m.name.split('/', 1)[-1] for m in tar.getmembers()}
    assert set(DATA) <= members and {'_build_commands.py', 'tests/conftest.py', 'README.md', 'LICENSE'} <= members
    embedded = zipfile.ZipFile(wheel).getinfo('t2t_timm/weights/test_t2t_vit.mnist.safetensors')
    assert embedded.file_size <= 2 * 2 ** 20


def test_wheel_in_an_empty_environment(dists, tmp_path):
    # torch and timm are the test environment's, behind the new one's own packages: they are too large to fetch twice
    venv.create(tmp_path / 'venv', with_pip=True)
    python = tmp_path / 'venv' / 'bin' / 'python'
    subprocess.run([python, '-m', 'pip', 'install', '--quiet', '--no-deps', dists[0]], check=True)
    site = Path(subprocess.run(
        [python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'], check=True, text=True,
        capture_output=True).stdout.strip())
    (site / 'zz_dependencies.pth').write_text('\n'.join(p for p in sys.path if p.endswith('site-packages')))
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    code = '''if True:
        import timm
        model = timm.create_model('test_t2t_vit', pretrained=True)
        import t2t_timm
        print(t2t_timm.__file__, len(timm.list_models('t2t_vit*')))'''
    out = subprocess.run([python, '-c', code], check=True, text=True, capture_output=True, env=env, cwd=tmp_path)
    path, count = out.stdout.split()
    assert path.startswith(str(site)) and count == '16'
    recipe = subprocess.run(
        [python.parent / 't2t-timm', 'recipe', 't2t_vit_14'], check=True, text=True, capture_output=True, env=env)
    assert recipe.stdout.strip() == str(site / 't2t_timm' / 'recipes' / 't2t_vit_14.yaml')
