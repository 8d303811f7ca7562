"""An interrupted train.py: what --resume brings back."""
import os
import re
import signal

import pytest
import torch
from pages import load, stated, top1

pytestmark = pytest.mark.slow


def state(file):
    """What is resumed of a checkpoint."""
    checkpoint = load(file)
    return [checkpoint[key] for key in ('epoch', 'state_dict', 'state_dict_ema')] + [checkpoint['optimizer']['state']]


def rates(out):
    """The learning rate of each update that a run printed, by epoch and update."""
    return {(int(e), int(u)): rate for e, u, rate in re.findall(r'Train: (\d+) \[ *(\d+)/.* LR: (\S+)', out)}


def test_killed_and_resumed(page, trained):
    """The page's run of four epochs, and the same killed in its third epoch."""
    process = page.start(page.command('--experiment whole').replace('--experiment whole', '--experiment killed'))
    before = ''
    while not re.search(r'Train: 2 \[   4/9', before):
        line = process.stdout.readline()
        assert line, before
        before += line
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    out, uninterrupted = trained('whole')
    folder = page.folder / 'out'
    left, expected = state(folder / 'killed' / 'last.pth.tar'), state(folder / 'whole' / 'checkpoint-1.pth.tar')
    torch.testing.assert_close(left, expected, rtol=0, atol=0)  # the killed epoch is lost
    after, last = trained('killed')
    resumed = rates(after)
    assert resumed == {k: v for k, v in rates(out).items() if k[0] >= 2} and len(resumed) == 18
    assert {state['step'].item() for state in last['optimizer']['state'].values()} == {4 * 9}
    assert last['epoch'] == uninterrupted['epoch'] == 3
    assert top1(after) == pytest.approx(top1(out), abs=4)
    for experiment, text in (('whole', out), ('killed', after)):
        assert top1(text) == pytest.approx(stated(page.command(f'--experiment {experiment}')), abs=8)
