"""Processes that begin with torch and torchvision imported, which is most of what `import timm` costs."""
import importlib
import multiprocessing
import os
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


def _main(module: str, env: dict[str, str], *args: Any) -> None:
    os.environ.clear()
    os.environ.update(env)
    importlib.import_module(module).main(*args)
