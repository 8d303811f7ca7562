"""The wheel and the source distribution are complete, and the wheel works where it alone is installed."""
import email
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

START_FILES = {'t2t_timm.pth', 't2t_timm.start', '_t2t_timm_autoload.py', '_t2t_timm_cli.py'}
NOT_IN_SDIST = ('.ci/', '.github/', '.gitignore', '.pre-commit-config.yaml')


@pytest.fixture(scope='module')
def dists(tmp_path_factory):
    """(wheel, sdist), made by python -m build."""
    out = tmp_path_factory.mktemp('dist')
    subprocess.run(  # with the setuptools of the test environment: nothing is downloaded
        [sys.executable, '-m', 'build', '--no-isolation', '--outdir', str(out), str(ROOT)], check=True,
        capture_output=True)
    return next(out.glob('*.whl')), next(out.glob('*.tar.gz'))


def test_wheel_holds_the_package_and_its_start_files(dists):
    sizes = {i.filename: i.file_size for i in zipfile.ZipFile(dists[0]).infolist() if '.dist-info/' not in i.filename}
    package = {
        p.relative_to(ROOT).as_posix() for p in (ROOT / 't2t_timm').rglob('*')
        if p.is_file() and p.parent.name != '__pycache__'}
    assert set(sizes) == package | START_FILES
    embedded, = (size for name, size in sizes.items() if name.endswith('.safetensors'))
    assert embedded <= 2 * 2 ** 20


def test_metadata(dists):
    wheel = zipfile.ZipFile(dists[0])
    files = {n.partition('.dist-info/')[2] for n in wheel.namelist()}
    assert {'licenses/LICENSE', 'licenses/NOTICE', 'entry_points.txt'} <= files
    text = wheel.read(next(n for n in wheel.namelist() if n.endswith('/METADATA'))).decode()
    metadata = email.message_from_string(text)
    assert metadata['Author'] == 'The t2t-timm authors' and metadata['License'] == 'Apache-2.0'
    assert f'Programming Language :: Python :: {metadata["Requires-Python"].removeprefix(">=")}' in \
        metadata.get_all('Classifier')


def test_sdist_holds_the_tree(dists):
    if not (ROOT / '.git').exists():
        pytest.skip('not a git checkout, so what belongs to the tree is not known: run it in a clone')
    listed = subprocess.run(
        ['git', 'ls-files', '--cached', '--others', '--exclude-standard'], cwd=ROOT, check=True, text=True,
        capture_output=True).stdout.splitlines()
    tree = {n for n in listed if (ROOT / n).is_file() and not n.startswith(NOT_IN_SDIST)}
    with tarfile.open(dists[1]) as tar:
        members = {m.name.partition('/')[2] for m in tar.getmembers() if m.isfile()}
    assert {m for m in members if not m.startswith('t2t_timm.egg-info/')} == tree | {'PKG-INFO'}


def test_wheel_in_an_empty_environment(dists, tmp_path):
    # torch and timm are the test environment's, behind the new one's own packages: they are too large to fetch twice
    venv.create(tmp_path / 'venv')
    python = tmp_path / 'venv' / 'bin' / 'python'
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    subprocess.run(
        [sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet', '--no-deps', '--no-index', dists[0]],
        check=True, env=env)
    site = Path(subprocess.run(
        [python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))'], check=True, text=True,
        capture_output=True, env=env).stdout.strip())
    (site / 'zz_dependencies.pth').write_text('\n'.join(p for p in sys.path if p.endswith('site-packages')))
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
