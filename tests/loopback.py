"""What the loopback tests share, a pytest plugin: weights to serve, the hosts, processes that load from them."""
import argparse
import io
import os
from collections.abc import Callable, Iterator
from functools import cached_property
from multiprocessing import Process
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import warm
from hub_client import SMALL, digest
from hub_server import FileServer, HubServer

# arguments that make any performer small, and one of 17 MB
TINY = dict(SMALL, num_classes=1000)
BIG = dict(embed_dim=256, depth=7, num_heads=4, mlp_ratio=2., num_classes=1000)


class Weights:
    """A model's weights as files: what the Hub would hold, and a publisher's pickle of the same."""

    def __init__(self, seed: int, architecture: str = 't2t_vit_7', **kwargs: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        meta = timm.create_model(architecture, device='meta', **kwargs).state_dict()  # initial weights take longer
        self.state_dict = {k: torch.empty(v.shape).uniform_(-0.1, 0.1, generator=generator) for k, v in meta.items()}
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


def finish(process: Process) -> list:
    """Wait for a client and return the results of its stages."""
    assert process.connection.poll(120)
    return process.connection.recv()


def ask(process: Process, *stages: dict[str, Any]) -> list:
    """Have a client carry out stages and return their results."""
    process.connection.send(stages)
    return finish(process)


@pytest.fixture(scope='module')
def hosts() -> Iterator[SimpleNamespace]:
    """The Hub, its storage and a release host."""
    storage, release = FileServer(), FileServer()
    hub = HubServer(storage)
    with storage.running(), release.running(), hub.running():
        yield SimpleNamespace(hub=hub, storage=storage, release=release)


@pytest.fixture(scope='module')
def start_client(hosts: SimpleNamespace, tmp_path_factory) -> Iterator[Callable[..., Process]]:
    """Start a process that carries out a plan (see hub_client.py); `finish(process)` waits and returns its results.

    Afterwards, or without a plan, it waits for others: `ask(process, *stages)`.
    """
    folder = tmp_path_factory.mktemp('clients')
    started = []

    def start(*stages: dict[str, Any], **env: str) -> Process:
        clean = {
            k: v for k, v in os.environ.items()
            if not k.upper().startswith(('HF_', 'HUGGING', 'T2T_', 'TORCH_HOME', 'TIMM_', 'HTTP', 'ALL_PROXY'))}
        clean |= dict(
            HF_ENDPOINT=hosts.hub.url,
            HF_HOME=str(folder / 'hf'),
            TORCH_HOME=str(folder / 'torch'),
            HF_HUB_DISABLE_XET='1',  # the loopback storage speaks plain HTTP
            HF_HUB_DISABLE_TELEMETRY='1',
            HF_HUB_DISABLE_PROGRESS_BARS='1',
            OMP_NUM_THREADS='1',
        ) | env
        ours, theirs = warm.CONTEXT.Pipe()
        process = warm.start('hub_client', clean, theirs)
        theirs.close()  # so that the client's end is noticed
        process.connection = ours
        started.append(process)
        if stages:
            ours.send(stages)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()
