"""The client's side of the tests, a process of its own: receive plans, load weights, send what came of them.

A plan is a list of stages. A stage sets `env`, takes releases from the host `release`, lets
the manifest know `known` (name: facts), makes every architecture `small`, forbids files of more than `file_limit`
bytes, waits at a `barrier` for a second process, runs `commands` of t2t-timm, and creates the models of its `cases`,
each in a thread of its own.
"""
import contextlib
import hashlib
import io
import logging
import os
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import timm
import torch
from timm.models import _registry

from t2t_timm.cli import main as t2t_timm_main
from t2t_timm.weights.manifest import load_manifest

# arguments that make any architecture with a release small
SMALL = dict(embed_dim=64, depth=1, num_heads=4, mlp_ratio=2., img_size=32)
UNKNOWN = dict(size=None, sha256=None, sha384=None, sha256_prefix=None, hub={})
LOG = []  # messages, each beginning with the architecture.tag it is about
HUB_LOG = []  # warnings of huggingface_hub


class ListHandler(logging.Handler):
    def __init__(self, log: list) -> None:
        super().__init__()
        self.log = log

    def emit(self, record: logging.LogRecord) -> None:
        self.log.append(record.getMessage())


def digest(state_dict) -> str:
    """Return a hash of every tensor but the head's."""
    hashed = hashlib.sha256()
    for k, v in sorted(state_dict.items()):
        if not k.startswith('head.'):
            hashed.update(k.encode() + v.contiguous().numpy().tobytes())
    return hashed.hexdigest()


def patch_manifest(name: str, known: dict) -> None:
    weights = load_manifest()['weights']
    weights[name] = replace(weights[name], **known)


def make_small(architectures: set) -> None:
    def build(entrypoint, *args, **kwargs):
        return entrypoint(*args, **dict(SMALL, **kwargs))

    for architecture in architectures:
        entrypoint = _registry._model_entrypoints[architecture]
        _registry._model_entrypoints[architecture] = partial(build, entrypoint)


def load(case: dict) -> dict:
    start = len(LOG)
    cache_dir = case.get('cache_dir')
    try:
        model = timm.create_model(case['model'], pretrained=True, cache_dir=cache_dir, **case.get('kwargs', {}))
        result = dict(ok=True, digest=digest(model.state_dict()), cfg_file=model.pretrained_cfg.get('file'))
    except Exception as e:
        result = dict(
            ok=False, error=type(e).__name__, message=str(e),
            chained=sum(line.startswith('Traceback') for line in traceback.format_exception(e)) - 1)
    result['hub_log'] = HUB_LOG[:]  # of all cases of the process
    result['log'] = [line for line in LOG[start:] if line.startswith(f'{case["model"]}: ')]
    if cache_dir:
        result['files'] = sorted(
            p.name for p in Path(cache_dir).rglob('*')
            if p.name.endswith(('.safetensors', '.tar', '.pth', '.incomplete')) or len(p.name) == 64)
    return result


def run_command(argv: list) -> dict:
    start = len(LOG)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = t2t_timm_main(argv)
    return dict(code=code, out=out.getvalue(), err=err.getvalue(), log=LOG[start:])


def wait_for_the_other(barrier: str) -> None:
    Path(f'{barrier}.{os.getpid()}').touch()
    while len(list(Path(barrier).parent.glob(f'{Path(barrier).name}.*'))) < 2:
        time.sleep(0.01)


def carry_out(stage: dict, released: dict) -> dict:
    """Carry out a stage and return what came of its commands and cases."""
    os.environ.update(stage.get('env', {}))
    if 'release' in stage:
        for name in released:
            patch_manifest(name, dict(url=f'{stage["release"]}/{load_manifest()["weights"][name].file}'))
    for name, known in stage.get('known', {}).items():
        patch_manifest(name, dict(UNKNOWN, **known))
    if stage.get('small'):
        make_small({name.split('.')[0] for name in released})
    cases = stage.get('cases', [])
    for case in cases:
        if 'known' in case:
            patch_manifest(case['model'], dict(UNKNOWN, **case['known']))
    if 'barrier' in stage:
        wait_for_the_other(stage['barrier'])
    with contextlib.ExitStack() as stack:
        if 'file_limit' in stage:  # let writing fail as on a full disk
            import resource  # where there is one
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, limits)
            resource.setrlimit(resource.RLIMIT_FSIZE, (stage['file_limit'], limits[1]))
        commands = [run_command(argv) for argv in stage.get('commands', ())]
    with ThreadPoolExecutor(16) as threads:
        loaded = list(threads.map(load, cases))
    return dict(
        commands=commands, cases={case['case']: result for case, result in zip(cases, loaded, strict=True)})


def main(connection: Connection) -> None:
    torch.set_num_threads(1)
    sleep = time.sleep
    time.sleep = lambda seconds: sleep(seconds / 20)  # between attempts, of huggingface_hub and our own
    logger = logging.getLogger('t2t_timm')
    logger.setLevel(logging.INFO)
    logger.addHandler(ListHandler(LOG))
    logging.getLogger('huggingface_hub').addHandler(ListHandler(HUB_LOG))
    released = {name: entry for name, entry in load_manifest()['weights'].items() if entry.url}
    for name in released:  # a case that names no release of its own finds none
        patch_manifest(name, dict(url='http://127.0.0.1:9/'))
    while True:
        connection.send([carry_out(stage, released) for stage in connection.recv()])
