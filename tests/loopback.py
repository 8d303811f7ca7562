"""What the loopback tests share, a pytest plugin: weights to serve, the hosts, processes that load from them."""
import argparse
import io
import json
import os
import subprocess
import sys
from functools import cached_property
from pathlib import Path
from typing import Any, Callable, Dict, Iterator

import pytest
import safetensors.torch
import timm
import torch
from hub_client import SMALL, digest
from hub_server import FileServer, HubServer

# arguments that make any performer small, and one of 17 MB
TINY = dict(SMALL, num_classes=1000)
BIG = dict(embed_dim=256, depth=7, num_heads=4, mlp_ratio=2., num_classes=1000)


class Weights:
    """A model's weights as files: what the Hub would hold, and a publisher's pickle of the same."""

    def __init__(self, seed: int, architecture: str = 't2t_vit_7', **kwargs: Any) -> None:
        torch.manual_seed(seed)
        self.kwargs = kwargs
        self.state_dict = timm.create_model(architecture, **kwargs).state_dict()
        self.safetensors = safetensors.torch.save(self.state_dict)
        self.digest = digest(self.state_dict)

    @cached_property
    def pickle(self) -> bytes:
        """The same weights as a publisher's pickle."""
        return _pickled(state_dict=self.state_dict)

    @cached_property
    def training_pickle(self) -> bytes:
        """The same weights as the authors published theirs: averaged beside plain ones, DDP's prefix, arguments."""
        return _pickled(
            state_dict={k: torch.zeros_like(v) for k, v in self.state_dict.items()},
            state_dict_ema={f'module.{k}': v for k, v in self.state_dict.items()},
            args=argparse.Namespace(lr=5e-4, model='t2t'),
        )


def _pickled(**checkpoint: Any) -> bytes:
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getvalue()


class Hosts:
    """The Hub, its storage and a release host."""

    def __init__(self, hub: HubServer, release: FileServer) -> None:
        self.hub, self.storage, self.release = hub, hub.storage, release


def ask(process: subprocess.Popen, *stages: Dict[str, Any]) -> list:
    """Have a client that was started with `keep` carry out stages and return their results."""
    process.stdin.write(json.dumps(dict(result=str(process.result), stages=stages)) + '\n')
    process.stdin.flush()
    assert process.stdout.readline() == 'done\n', process.communicate()[1]
    return json.loads(process.result.read_text())


def finish(process: subprocess.Popen) -> list:
    """Wait for a client and return the results of its stages."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(process.result.read_text())


@pytest.fixture(scope='module')
def hosts() -> Iterator[Hosts]:
    storage, release = FileServer(), FileServer()
    hub = HubServer(storage, release)
    with storage.running(), release.running(), hub.running():
        yield Hosts(hub, release)


@pytest.fixture(scope='module')
def start_client(hosts: Hosts, tmp_path_factory) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a process that carries out a plan (see hub_client.py); `finish(process)` waits and returns its results.

    With `keep` it waits for plans: `ask(process, *stages)`.
    """
    folder = tmp_path_factory.mktemp('clients')
    started = []

    def start(*stages: Dict[str, Any], keep: bool = False, **env: str) -> subprocess.Popen:
        clean = {
            k: v for k, v in os.environ.items()
            if not k.upper().startswith(('HF_', 'HUGGING', 'T2T_', 'TORCH_HOME', 'TIMM_'))
            and not k.lower().endswith('_proxy')
        }
        clean.update(
            HF_ENDPOINT=hosts.hub.url,
            HF_HOME=str(folder / 'hf'),
            TORCH_HOME=str(folder / 'torch'),
            HF_HUB_DISABLE_XET='1',  # the loopback storage speaks plain HTTP
            HF_HUB_DISABLE_TELEMETRY='1',
            HF_HUB_DISABLE_PROGRESS_BARS='1',
            OMP_NUM_THREADS='1',
        )
        clean.update(env)
        result = folder / f'result{len(started)}.json'
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name('hub_client.py'))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=clean)
        process.result = result
        started.append(process)
        if not keep:
            process.stdin.write(json.dumps(dict(result=str(result), stages=stages)))
            process.stdin.close()
            process.stdin = None
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
