"""The oldest releases that setup.cfg allows, for `make test-oldest`.

    pip install $(python tools/oldest.py)    each lower bound of install_requires as a pin
    python tools/oldest.py --python          an interpreter of the oldest Python, if there is one
"""
import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

SETUP = Path(__file__).parents[1] / 'setup.cfg'
TORCHVISION = {'2.5.1': '0.20.1'}  # timm needs it, and each release works with one release of torch alone


def _options():
    config = ConfigParser(interpolation=None)
    config.read_string(SETUP.read_text(encoding='utf-8'))
    return config['options']


def oldest_releases() -> list[str]:
    """Return the requirements, each pinned to its lower bound if it has one, and the torchvision of that torch."""
    bounds = [line.partition('>=') for line in _options()['install_requires'].split()]
    pins = [f'{name}=={bound}' if bound else name for name, _, bound in bounds]
    return [*pins, *(f'torchvision=={TORCHVISION[bound]}' for name, _, bound in bounds if name == 'torch')]


def oldest_python() -> str:
    """Return the oldest Python that python_requires allows, or this one if it is not on the machine."""
    version = _options()['python_requires'].removeprefix('>=')
    pyenv = Path(os.environ.get('PYENV_ROOT', Path.home() / '.pyenv')).glob(f'versions/{version}.*/bin/python')
    for python in [shutil.which(f'python{version}'), *sorted(pyenv)]:  # pyenv's shims may stand for nothing
        if python and subprocess.run([python, '-c', 'import venv'], capture_output=True).returncode == 0:
            return str(python)
    print(f'There is no Python {version} here: using {sys.version.split()[0]}.', file=sys.stderr)
    return sys.executable


if __name__ == '__main__':
    print(*([oldest_python()] if sys.argv[1:] == ['--python'] else oldest_releases()), sep='\n')
