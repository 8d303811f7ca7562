"""Several processes on one machine: torchrun with gloo, over loopback."""
import os
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch.distributed.run
import warm

RANKS = str(Path(__file__).parent / 'ranks.py')
TIMEOUT = 240  # seconds; a launch takes about ten

if sys.platform == 'linux':
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')  # not the address that this machine's name may resolve to


@contextmanager
def time_limit():
    """End the processes that were started in it if they take longer than TIMEOUT."""
    timer = threading.Timer(TIMEOUT, lambda: [p.terminate() for p in active_children()])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@pytest.fixture(scope='session')
def torchrun():
    """A function that runs ranks.py on two ranks, and raises if one of them fails.

    On one node of two processes, or on two nodes of one process each, which are two launches. The ranks are forked from
    a process that has imported torch.
    """
    def torchrun(*args, nodes=1):
        node_args = [['--standalone']]
        if nodes > 1:
            with socket.socket() as s:
                s.bind(('127.0.0.1', 0))
                port = str(s.getsockname()[1])
            node_args = [
                ['--nnodes', str(nodes), '--node-rank', str(i), '--master-addr', '127.0.0.1', '--master-port', port]
                for i in range(nodes)]
        rank_args = [
            '--nproc-per-node', str(2 // nodes), '--start-method', warm.METHOD, '--run-path', RANKS, *map(str, args)]
        with time_limit(), ThreadPoolExecutor() as pool:  # in a main thread they would handle pytest's signals
            list(pool.map(lambda node: torch.distributed.run.main([*node, *rank_args]), node_args))
    return torchrun


@pytest.fixture(scope='session')
def torchrun_command():
    """A function that runs the command torchrun with ranks.py, and returns its exit code and stderr.

    The ranks are fresh interpreters: of those, torchrun tells which one failed first.
    """
    def torchrun_command(*args):
        code = 'import sys; from torch.distributed.run import main; main(sys.argv[1:])'
        with time_limit():
            done = warm.run(code, '--standalone', '--nproc-per-node', '2', RANKS, *map(str, args))
        return done.returncode, done.stderr
    return torchrun_command
