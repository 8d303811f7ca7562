"""Two ranks: a step gives the gradients of one process with the whole batch, and a killed rank loses nothing."""
import re
import shutil

import pytest
import torch
import torch.distributed.fsdp
from ranks import DDP_WAYS, FSDP_WAYS, MODELS, create_model, create_optimizer, gradients, load_batch, loss_of

HAS_FSDP2 = hasattr(torch.distributed.fsdp, 'fully_shard')
needs_fsdp2 = pytest.mark.skipif(
    not HAS_FSDP2, reason='torch before 2.6 has no torch.distributed.fsdp.fully_shard: install a newer torch')
DDP = [f'{name}-{way}' for name in MODELS for way in DDP_WAYS]
FSDP = [f'{name}-{way}' for name in MODELS for way in FSDP_WAYS]
TOLERANCE = 1e-11  # of the largest magnitude of a tensor, in float64; seen: 6e-14


@pytest.fixture(scope='module')
def images_dir(heldout, tmp_path_factory):
    """Two images of each class."""
    out = tmp_path_factory.mktemp('steps') / 'images'
    for folder in heldout.iterdir():
        (out / folder.name).mkdir(parents=True)
        for image in sorted(folder.iterdir())[:2]:
            shutil.copy(image, out / folder.name)
    return out


@pytest.fixture(scope='module')
def run(torchrun, images_dir, tmp_path_factory):
    """A function that takes the steps of the cases on two ranks and returns a function from a case to both results."""
    def run(cases, out=None, **kwargs):
        out = out or tmp_path_factory.mktemp('steps')
        torchrun('--data-dir', images_dir, '--output', out, '--batch-size', 10, *cases, **kwargs)
        return lambda case: [torch.load(out / f'{case}.{rank}.pt', weights_only=True) for rank in range(2)]
    return run


@pytest.fixture(scope='module')
def two_ranks(run):
    return run(DDP + (FSDP if HAS_FSDP2 else []))


@pytest.fixture(scope='module')
def killed(torchrun_command, images_dir, tmp_path_factory):
    """Folder, exit code and stderr of a run whose rank 1 was killed in epoch 2."""
    out = tmp_path_factory.mktemp('killed')
    return out, *torchrun_command(
        '--data-dir', images_dir, '--output', out, '--batch-size', 10, 'performer-killed')


@pytest.fixture(scope='module')
def one_process(images_dir):
    """Gradients, and weights after the step, of one process with the whole batch, by model."""
    images, labels = load_batch(images_dir, 20)
    results = {}
    for name in MODELS:
        model = create_model(name, seed=0)
        loss_of(model, images, labels).backward()
        grads = gradients(model)
        create_optimizer(model).step()
        results[name] = dict(grads=grads, state=model.state_dict(), images=images)
    return results


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert (actual[key] - value).abs().max() <= tolerance * value.abs().max(), key


def check_step(results, expected):
    halves = [result['images'] for result in results]
    assert torch.equal(torch.stack(halves, dim=1).flatten(0, 1), expected['images'])  # dealt out in turn
    for result in results:
        assert_close(result['grads'], expected['grads'])
        # Adam divides a gradient by its magnitude, which magnifies the rounding of the smallest; seen: 4e-12
        assert_close(result['state'], expected['state'], tolerance=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize('case', DDP)
def test_ddp(case, two_ranks, one_process):
    results = two_ranks(case)
    check_step(results, one_process[case.split('-')[0]])
    assert all(result['fused'] for result in results)  # DDP observes no module of the model
    for key, value in results[0]['state'].items():
        assert torch.equal(results[1]['state'][key], value)
        assert torch.equal(results[1]['ema'][key], results[0]['ema'][key])


@pytest.mark.slow
def test_ddp_hands_out_what_rank_0_has_and_nobody_trains(two_ranks):
    first, second = two_ranks('performer-ddp')
    names = ('patch_embed.attention1.w', 'patch_embed.attention2.w', 'pos_embed')  # random features and positions
    assert set(first['start']) == set(names) and not set(first['grads']) & set(names)
    for name in names:
        assert not torch.allclose(first['start'][name], second['start'][name])
        assert torch.equal(first['start'][name], first['state'][name])
        assert torch.equal(first['start'][name], second['state'][name])


@pytest.mark.slow
def test_two_nodes(run, one_process):
    check_step(run(['performer-ddp'], nodes=2)('performer-ddp'), one_process['performer'])


@needs_fsdp2
@pytest.mark.slow
@pytest.mark.parametrize('case', FSDP)
def test_fsdp2(case, two_ranks, one_process):
    results = two_ranks(case)
    check_step(results, one_process[case.split('-')[0]])
    assert all(result['sharded'] for result in results)


@pytest.mark.slow
def test_a_killed_rank_ends_the_job(killed):
    out, code, stderr = killed
    assert code != 0
    assert re.search(r'rank +: 1 \(local_rank: 1\)\s+exitcode +: -9 ', stderr), stderr
    assert torch.load(out / 'last.pth.tar', weights_only=True)['epoch'] == 1


@pytest.mark.slow
def test_a_restart_loses_nothing(killed, run):
    results = run(['performer-whole', 'performer-resumed'], out=killed[0])
    for whole, resumed in zip(results('performer-whole'), results('performer-resumed'), strict=True):
        assert (whole.pop('start_epoch'), resumed.pop('start_epoch')) == (0, 2)
        torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
