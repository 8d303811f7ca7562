"""An interrupted train.py: what --resume brings back, and what a damaged checkpoint says."""
import re

import pytest
import timm
import torch
from pages import load, stated, top1
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, NativeScaler

STATE = ('epoch', 'state_dict', 'state_dict_ema', 'optimizer')


def same(a, b):
    """Whether two states are equal bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Run:
    """A training run on the CPU, of the parts that train.py is made of."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.task = ClassificationTask(timm.create_model('test_t2t_vit'), torch.nn.CrossEntropyLoss(), verbose=False)
        self.optimizer = create_optimizer_v2(self.task.get_trainable_module(), opt='adamw', lr=1e-3, weight_decay=0.05)
        self.scaler = NativeScaler(device='cpu')
        self.scaler._scaler.set_growth_interval(3)  # so that its scale grows within two epochs
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, 'cosine', num_epochs=4, warmup_epochs=1, step_on_epochs=False, updates_per_epoch=2)

    def epoch(self, number):
        for step in range(2):
            loss = self.task(torch.randn(2, 3, 56, 56), torch.arange(2))['loss']
            self.scaler(loss, self.optimizer, parameters=self.task.parameters(), clip_grad=1.)
            self.optimizer.zero_grad()
            self.task.update_ema(step=2 * number + step + 1)
            self.scheduler.step_update(2 * number + step + 1)

    def state(self):
        return dict(
            **self.task.get_checkpoint_state(), **self.task.get_checkpoint_state(ema=True),
            optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())


@pytest.fixture
def saved(tmp_path):
    """A run of two epochs and the checkpoint that it left."""
    run = Run(seed=0)
    run.task.setup_ema(decay=0.9)
    saver = CheckpointSaver(
        run.task.get_trainable_module(), run.optimizer, amp_scaler=run.scaler, checkpoint_dir=str(tmp_path),
        task=run.task)
    for number in range(2):
        run.epoch(number)
        saver.save_checkpoint(number, metric=number)
    return run, tmp_path / 'last.pth.tar'


def test_the_whole_state_comes_back_bit_for_bit(saved):
    run, path = saved
    other = Run(seed=1)
    assert resume_task_checkpoint(other.task, path, other.optimizer, other.scaler, log_info=False) == 2
    other.task.setup_ema(decay=0.9)
    load_task_ema_checkpoint(other.task, path)
    other.scheduler.step_update(2 * 2)
    state, expected = other.state(), run.state()
    assert not same(state['state_dict'], state['state_dict_ema'])
    assert same(state, expected) and state['scaler']['scale'] > 65536


def test_a_recovery_checkpoint_skips_the_rest_of_its_epoch(tmp_path):
    run = Run(seed=0)
    saver = CheckpointSaver(
        run.task.get_trainable_module(), run.optimizer, recovery_dir=str(tmp_path), task=run.task)
    saver.save_recovery(epoch=2, batch_idx=5)
    path = tmp_path / 'recovery-2-5.pth.tar'
    assert resume_task_checkpoint(run.task, path, run.optimizer, log_info=False) == 3


@pytest.fixture(scope='module')
def interrupted(page, trained):
    """What the page's run printed, killed in its third epoch and then resumed, and its last checkpoint at the kill."""
    whole = page.command('--experiment whole').partition('#')[0]
    process = page.start(whole.replace('--experiment whole', '--experiment killed'))
    before = ''
    while not re.search(r'Train: 2 \[   4/9', before):
        line = process.stdout.readline()
        assert line, before
        before += line
    page.kill(process)
    checkpoint = load(page.folder / 'out' / 'killed' / 'last.pth.tar')
    return before, checkpoint, *trained('killed')


def rates(out):
    """The learning rate of each update that a run printed, by epoch and update."""
    return {(int(e), int(u)): rate for e, u, rate in re.findall(r'Train: (\d+) \[ *(\d+)/.* LR: (\S+)', out)}


@pytest.mark.slow
def test_killed_and_resumed(page, trained, interrupted):
    before, checkpoint, after, last = interrupted
    out, uninterrupted = trained('whole')
    assert checkpoint['epoch'] == 1  # of 0, 1: the killed epoch is lost
    assert same({k: v for k, v in checkpoint.items() if k in STATE}, {
        k: v for k, v in load(page.folder / 'out' / 'whole' / 'checkpoint-1.pth.tar').items() if k in STATE})
    for words in ('Restoring model state', 'Restoring optimizer state', r'\(epoch 1\)', 'Loaded state_dict_ema'):
        assert re.search(words, after)
    assert re.search(r'Train: (\d+) ', after)[1] == '2'
    resumed = rates(after)
    assert resumed == {k: v for k, v in rates(out).items() if k[0] >= 2} and len(resumed) == 18
    assert {state['step'].item() for state in last['optimizer']['state'].values()} == {4 * 9}
    assert last['epoch'] == uninterrupted['epoch'] == 3
    assert top1(after) == pytest.approx(top1(out), abs=4)
    for experiment, text in (('whole', out), ('killed', after)):
        assert top1(text) == pytest.approx(stated(page.command(f'--experiment {experiment}')), abs=8)
    assert (page.folder / 'out' / 'killed' / 'summary.csv').read_text().count('epoch,') == 2
    for key in ('state_dict', 'state_dict_ema'):  # other batches and other dropout since: close, and not the same
        assert not same(last[key], uninterrupted[key])


@pytest.mark.slow
def test_a_resumed_epoch_draws_what_the_first_drew(page, interrupted):
    """Nothing of the random state is saved, and the seed is set again."""
    def last_batch(experiment, options=''):
        page.run(f'finetune --save-images --experiment {experiment} {options}')
        return (page.folder / 'out' / experiment / 'train-batch-8.jpg').read_bytes()

    first = last_batch('first')
    resume = '--epochs 3 --resume out/killed/checkpoint-1.pth.tar'
    assert last_batch('again', resume) == first
    assert last_batch('otherwise', f'{resume} --seed 43') != first
