"""Processes that begin with torch and torchvision imported, which is most of what `import timm` costs."""
import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

METHOD = 'forkserver' if 'forkserver' in multiprocessing.get_all_start_methods() else 'spawn'  # as on Windows
CONTEXT = multiprocessing.get_context(METHOD)
if METHOD == 'forkserver':
    CONTEXT.set_forkserver_preload(['torch', 'torchvision'])  # not timm: huggingface_hub reads its environment once


def start(module: str, env: dict[str, str], *args: Any) -> multiprocessing.Process:
    """Start `main(*args)` of a module of the tests in a process that has this environment and no other."""
    process = CONTEXT.Process(target=_main, args=(module, env, *args), daemon=True)
    process.start()
    return process


def run(code: str, *argv: str, **env: str) -> subprocess.CompletedProcess:
    """Run code to its end as `python -c` would, with these variables added to this process's environment."""
    with tempfile.TemporaryDirectory() as folder:
        process = start('warm', dict(os.environ, **env), code, argv, os.getcwd(), folder)
        process.join()
        out, err = ((Path(folder) / name).read_text() for name in ('out', 'err'))
    return subprocess.CompletedProcess([code, *argv], process.exitcode, out, err)


def main(code: str, argv: tuple[str, ...], cwd: str, folder: str) -> None:
    for stream, name in ((sys.stdout, 'out'), (sys.stderr, 'err')):
        with open(Path(folder) / name, 'w') as file:
            os.dup2(file.fileno(), stream.fileno())
    os.chdir(cwd)
    sys.argv = ['-c', *argv]
    exec(code, {'__name__': '__main__'})


def _main(module: str, env: dict[str, str], *args: Any) -> None:
    os.environ.clear()
    os.environ.update(env)
    importlib.import_module(module).main(*args)
