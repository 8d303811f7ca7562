"""Several processes on one machine: torchrun with gloo, over loopback."""
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from t2t_timm.digits import extract_heldout

HERE = Path(__file__).parent
TIMEOUT = 240  # seconds; a launch takes about ten


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='session')
def torchrun():
    """A function that runs a program of this folder on two ranks and returns each launch's exit code and stderr.

    On one node of two processes, or on two nodes of one process each, which are two launches.
    """
    def torchrun(program, *args, nodes=1):
        launch = [sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', str(2 // nodes)]
        if nodes == 1:
            node_args = [['--standalone']]
        else:
            port = str(free_port())
            node_args = [
                ['--nnodes', str(nodes), '--node-rank', str(i), '--master-addr', '127.0.0.1', '--master-port', port]
                for i in range(nodes)]
        env = {**os.environ, 'OMP_NUM_THREADS': '1'}
        if sys.platform == 'linux':
            env['GLOO_SOCKET_IFNAME'] = 'lo'  # not the address that this machine's name may resolve to
        processes = [
            subprocess.Popen(
                [*launch, *node, HERE / program, *map(str, args)], env=env, text=True, stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE, start_new_session=True)
            for node in node_args]
        try:
            return [(p.communicate(timeout=TIMEOUT)[1], p.returncode)[::-1] for p in processes]
        finally:
            for p in processes:
                if p.poll() is None:
                    os.killpg(p.pid, signal.SIGKILL)
                    p.wait()
    return torchrun


@pytest.fixture(scope='session')
def heldout(tmp_path_factory):
    """The 1,000 digits of the package as an ImageFolder."""
    return extract_heldout(tmp_path_factory.mktemp('digits') / 'heldout')
