"""Training on two ranks: as accurate as one process, and nothing lost when a rank is killed."""
import json
import re

import pytest
import torch

# of 200 images after 6 epochs; eleven runs of one process and of two ranks gave 80.3 with a standard deviation of 3.3
# (docs/scale.md), and this is four below
LOWEST_TOP1 = 67.
EPOCHS, KILLED_IN = 4, 2  # of the runs whose results are only compared with each other


@pytest.fixture(scope='module')
def run(heldout, tmp_path_factory):
    """A function that returns the arguments of a launch, up to its output: so many digits of each class, a fifth of
    them to validate on, and no random number but those of the initial weights.
    """
    def run(count, epochs):
        root = tmp_path_factory.mktemp('digits')
        for folder in heldout.iterdir():
            for i, image in enumerate(sorted(folder.iterdir())[:count]):
                out = root / ('train' if i % 5 else 'validation') / folder.name
                out.mkdir(parents=True, exist_ok=True)
                (out / image.name).symlink_to(image)
        return 'train_ddp.py', '--data-dir', root, '--exact', '--epochs', epochs, '--output'
    return run


@pytest.fixture(scope='module')
def short(run):
    return run(25, EPOCHS)


@pytest.fixture(scope='module')
def killed(torchrun_command, short, tmp_path_factory):
    """Folder, exit code and stderr of a run whose rank 1 was killed in the middle of an epoch."""
    out = tmp_path_factory.mktemp('training') / 'killed'
    return out, *torchrun_command(*short, out, '--kill-in-epoch', KILLED_IN)


def read_log(out):
    return [json.loads(line) for line in (out / 'log.jsonl').read_text().splitlines()]


def read_checkpoint(out):
    return torch.load(out / 'last.pth.tar', weights_only=True)


@pytest.mark.slow
def test_two_ranks_learn_as_one_process(torchrun, run, tmp_path):
    torchrun(*run(100, epochs=6), tmp_path)
    log = read_log(tmp_path)
    assert [row['epoch'] for row in log] == list(range(6))
    assert log[-1]['top1'] >= LOWEST_TOP1


@pytest.mark.slow
def test_a_killed_rank_ends_the_job(killed):
    out, code, stderr = killed
    assert code != 0
    assert re.search(r'rank +: 1 \(local_rank: 1\)\s+exitcode +: -9 ', stderr), stderr
    assert [row['epoch'] for row in read_log(out)] == list(range(KILLED_IN))
    assert read_checkpoint(out)['epoch'] == KILLED_IN - 1


@pytest.mark.slow
def test_a_restart_loses_nothing(killed, torchrun, short, tmp_path):
    out, uninterrupted = killed[0], tmp_path / 'uninterrupted'
    torchrun(*short, uninterrupted)
    torchrun(*short, out, '--resume', out / 'last.pth.tar')
    assert read_log(out) == read_log(uninterrupted)  # the epochs before the kill, and from that epoch on
    resumed, expected = read_checkpoint(out), read_checkpoint(uninterrupted)
    for key in ('state_dict', 'state_dict_ema'):
        assert resumed[key].keys() == expected[key].keys()
        assert all(torch.equal(resumed[key][name], value) for name, value in expected[key].items())
    for index, moments in expected['optimizer']['state'].items():
        assert all(torch.equal(resumed['optimizer']['state'][index][name], value) for name, value in moments.items())
