"""Fixtures: the loopback hosts, and processes that load from them."""
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator

import pytest
from hub_server import FileServer, HubServer
from loopback import Hosts


@pytest.fixture(scope='module')
def hosts() -> Iterator[Hosts]:
    storage, release = FileServer(), FileServer()
    hub = HubServer(storage, release)
    with storage.running(), release.running(), hub.running():
        yield Hosts(hub, release)


@pytest.fixture(scope='module')
def start_client(hosts: Hosts, tmp_path_factory) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a process that carries out a plan (see hub_client.py); `finish(process)` waits and returns its results."""
    folder = tmp_path_factory.mktemp('clients')
    started = []

    def start(*stages: Dict[str, Any], **env: str) -> subprocess.Popen:
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
        process.stdin.write(json.dumps(dict(result=str(result), stages=stages)))
        process.stdin.close()
        process.stdin = None
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
