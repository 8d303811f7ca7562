"""The tests' own set-up."""
import os

import torch


def test_workers_take_one_thread_each():
    assert 'PYTEST_XDIST_WORKER' not in os.environ or os.environ['OMP_NUM_THREADS'] == '1'
    assert torch.get_num_threads() == int(os.environ['OMP_NUM_THREADS'])
