"""Two ranks: a step gives the gradients of one process with the whole batch, and a killed rank loses nothing."""
import os
import re
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp
import torch.distributed.run
import warm
from ranks import DDP_WAYS, FSDP_WAYS, MODELS, create_model, create_optimizer, gradients, load_batch, loss_of

pytestmark = pytest.mark.slow

RANKS = str(Path(__file__).parent / 'ranks.py')
HAS_FSDP2 = hasattr(torch.distributed.fsdp, 'fully_shard')
DDP = [f'{name}-{way}' for name in MODELS for way in DDP_WAYS]
FSDP = [f'{name}-{way}' for name in MODELS for way in FSDP_WAYS]

if sys.platform == 'linux':
    os.environ.setdefault('GLOO_SOCKET_IFNAME', 'lo')  # not the address that this machine's name may resolve to


@pytest.fixture(scope='module')
def images_dir(heldout, tmp_path_factory):
    """Two images of each class."""
    out = tmp_path_factory.mktemp('steps') / 'images'
    for folder in heldout.iterdir():
        (out / folder.name).mkdir(parents=True)
        for image in sorted(folder.iterdir())[:2]:
            shutil.copy(image, out / folder.name)
    return out


@contextmanager
def time_limit(seconds=240):
    """End the processes that were started in it if they take longer; a launch takes about ten."""
    timer = threading.Timer(seconds, lambda: [p.terminate() for p in active_children()])
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def torchrun(images_dir, out, cases):
    """Run the cases on two ranks, forked from a process that has imported torch; give what each rank has of a case."""
    argv = ['--standalone', '--nproc-per-node', '2', '--start-method', warm.METHOD, '--run-path', RANKS,
            str(images_dir), str(out), *cases]
    with time_limit(), ThreadPoolExecutor() as pool:  # in a main thread it would handle pytest's signals
        pool.submit(torch.distributed.run.main, argv).result()
    return lambda case: [torch.load(out / f'{case}.{rank}.pt', weights_only=True) for rank in range(2)]


@pytest.fixture(scope='module')
def two_ranks(images_dir, tmp_path_factory):
    return torchrun(images_dir, tmp_path_factory.mktemp('steps'), DDP + (FSDP if HAS_FSDP2 else []))


@pytest.fixture(scope='module')
def one_process(images_dir):
    """Gradients, and weights after the step, of one process with the whole batch, by model."""
    images, labels = load_batch(images_dir)
    results = {}
    for name in MODELS:
        model = create_model(name, seed=0)
        loss_of(model, images, labels).backward()
        grads = gradients(model)
        create_optimizer(model).step()
        results[name] = dict(grads=grads, state=model.state_dict(), images=images)
    return results


def assert_close(actual, expected, tolerance):
    """Compare tensors by the largest magnitude of each."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert (actual[key] - value).abs().max() <= tolerance * value.abs().max(), key


def check_step(results, expected):
    halves = [result['images'] for result in results]
    assert torch.equal(torch.stack(halves, dim=1).flatten(0, 1), expected['images'])  # dealt out in turn
    for result in results:
        assert_close(result['grads'], expected['grads'], tolerance=1e-11)  # seen: 6e-14
        # Adam divides a gradient by its magnitude, which magnifies the rounding of the smallest; seen: 4e-12
        assert_close(result['state'], expected['state'], tolerance=1e-9)


@pytest.mark.parametrize('case', DDP)
def test_ddp(case, two_ranks, one_process):
    results = two_ranks(case)
    check_step(results, one_process[case.split('-')[0]])
    assert all(result['fused'] for result in results)  # DDP observes no module of the model
    for key, value in results[0]['state'].items():
        assert torch.equal(results[1]['state'][key], value)
        assert torch.equal(results[1]['ema'][key], results[0]['ema'][key])


def test_ddp_hands_out_what_rank_0_has_and_nobody_trains(two_ranks):
    first, second = two_ranks('performer-ddp')
    names = ('patch_embed.attention1.w', 'patch_embed.attention2.w', 'pos_embed')  # random features and positions
    assert set(first['start']) == set(names) and not set(first['grads']) & set(names)
    for name in names:
        assert not torch.allclose(first['start'][name], second['start'][name])
        assert torch.equal(first['start'][name], first['state'][name])
        assert torch.equal(first['start'][name], second['state'][name])


@pytest.mark.skipif(
    not HAS_FSDP2, reason='torch before 2.6 has no torch.distributed.fsdp.fully_shard: install a newer torch')
@pytest.mark.parametrize('case', FSDP)
def test_fsdp2(case, two_ranks, one_process):
    results = two_ranks(case)
    check_step(results, one_process[case.split('-')[0]])
    assert all(result['sharded'] for result in results)


def test_a_killed_rank_loses_nothing(images_dir, tmp_path):
    """The ranks that are killed are fresh interpreters: of those, torchrun tells which one failed first."""
    code = 'import sys; from torch.distributed.run import main; main(sys.argv[1:])'
    with time_limit():
        done = warm.run(
            code, '--standalone', '--nproc-per-node', '2', RANKS, str(images_dir), str(tmp_path), 'performer-killed')
    assert done.returncode and re.search(r'rank +: 1 \(local_rank: 1\)\s+exitcode +: -9 ', done.stderr), done.stderr
    assert torch.load(tmp_path / 'last.pth.tar', weights_only=True)['epoch'] == 1
    results = torchrun(images_dir, tmp_path, ['performer-whole', 'performer-resumed'])
    for whole, resumed in zip(results('performer-whole'), results('performer-resumed'), strict=True):
        assert (whole.pop('start_epoch'), resumed.pop('start_epoch')) == (0, 2)
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
