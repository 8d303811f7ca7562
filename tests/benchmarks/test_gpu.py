"""benchmarks/gpu.py on the CPU: its rows, its verdicts, and that nothing that goes wrong in a row stops the rest."""
import importlib
import json
import math
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

from t2t_timm import T2TViT

BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'
CPU = torch.device('cpu')
MIB = 2 ** 20


@pytest.fixture
def gpu(monkeypatch):
    """The module benchmarks/gpu.py."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module('gpu')


@pytest.fixture
def cases(gpu):
    """A function that returns the quick cases of a section."""
    def cases(section):
        return [case for case in gpu.make_cases(gpu.QUICK, CPU, compiled=True) if case.section == section]
    return cases


@pytest.fixture
def run(gpu, tmp_path, monkeypatch):
    """A function that runs the command with arguments and returns its exit code."""
    def run(*args):
        monkeypatch.setattr(sys, 'argv', ['gpu.py', *args])
        with pytest.raises(SystemExit) as end:
            gpu.main()
        return end.value.code
    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.slow
def test_every_row_is_there_and_finite(run, capsys):
    code = run('--device', 'cpu', '--quick', '--json', 'figures.json')
    out, err = capsys.readouterr()
    report = json.loads(Path('figures.json').read_text())
    assert code == (0 if all(v.startswith('PASS') for v in report['verdict'].values()) else 1), err
    assert [len(report[section]) for section in ('flat', 'range', 'steps')] == [11, 8, 12]
    assert report['left_out'] == {}
    assert not any('failed' in row for row in report['flat'] + report['range'] + report['steps'])
    for row in report['flat']:
        assert len(row['errors']) == 13 and row['error'] == max(row['errors'].values())
        assert 1e-9 < row['error'] < math.inf  # it is not compared with itself
        assert row['passed'] == (row['error'] <= row['threshold'])
    for row in report['steps']:
        assert 0 < row['lowest'] <= row['ratio'] <= row['highest'] < math.inf
    assert len({(row['step'], row['amp'], row['batch']) for row in report['steps']}) == 12
    for row in report['flat'] + report['range']:
        assert any(line.startswith(f'| {row["model"]}') and row['precision'] in line for line in out.splitlines())
    for section, name in (('flat', 'Flat images'), ('range', 'Range')):
        assert f'**{name}: {report["verdict"][section]}.**' in out
    assert torch.__version__ in out and timm.__version__ in out and 'row 31 of 31' in err


def test_ctrl_c_prints_what_there_is(gpu, run, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt
    first, second, *rest = gpu.make_cases(gpu.QUICK, CPU, compiled=True)
    monkeypatch.setattr(gpu, 'make_cases', lambda *args: [first, second._replace(run=interrupted), *rest])
    assert run('--device', 'cpu', '--quick') == 130
    report = json.loads(Path('t2t_timm_gpu.json').read_text())
    assert report['interrupted'] and len(report['flat']) == 1
    assert sum(map(len, report['left_out'].values())) == len(rest) + 1
    out, _ = capsys.readouterr()
    assert 'interrupted' in out and '| test_t2t_vit | float32, no TF32 |' in out and 'Left out, ' in out


def test_a_broken_model_fails(gpu, cases, monkeypatch):
    half = [case for case in cases('flat') if 'autocast' in case.label]
    right = gpu.measure(half, minutes=5)
    assert gpu.verdict('flat', right) == 'PASS, all of 4 rows'
    forward = T2TViT.forward
    monkeypatch.setattr(T2TViT, 'forward', lambda self, x: 1.1 * forward(self, x))
    wrong = gpu.measure(half, minutes=5)
    assert gpu.verdict('flat', wrong) == 'FAIL, 4 of 4 rows are over their threshold or not finite'
    assert all(0.08 < row['error'] < 0.13 for row in wrong['flat'])


def test_what_is_not_finite_fails(gpu, cases, monkeypatch):
    forward = T2TViT.forward
    monkeypatch.setattr(T2TViT, 'forward', lambda self, x: forward(self, x) * (math.inf if self.training else 1.))
    report = gpu.measure(cases('range')[1:2], minutes=5)
    assert gpu.verdict('range', report).startswith('FAIL, 1 of 1')
    assert report['range'][0]['not_finite'] == {s: ['logits in training', 'gradients'] for s in (1, 3, 10)}
    monkeypatch.setattr(T2TViT, 'forward', lambda self, x: forward(self, x) * math.nan)
    report = gpu.measure(cases('flat')[:1], minutes=5)
    assert gpu.verdict('flat', report).startswith('FAIL')
    assert gpu.rounded(report)['flat'][0]['error'] is None  # JSON has no infinity


def test_rows_that_cannot_run_do_not_stop_the_rest(gpu, cases, monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')

    def no_compiler(*args, **kwargs):
        raise RuntimeError('no C++ compiler | found\nand more')

    monkeypatch.setattr(gpu.exactness, 'value_range', no_memory)
    monkeypatch.setattr(torch, 'compile', no_compiler)
    steps = cases('steps')
    plain = next(case for case in steps if not case.label.endswith('compiled'))
    compiled = next(case for case in steps if case.label.endswith('compiled'))
    report = gpu.measure([*cases('range')[:1], compiled, plain], minutes=5)
    assert report['range'] == [dict(label='test_t2t_vit, normal, float16 autocast', failed='out of memory')]
    assert report['steps'][0]['failed'] == 'RuntimeError: no C++ compiler | found'
    assert report['steps'][1]['ratio'] > 0
    assert gpu.verdict('range', report) == 'INCOMPLETE, 1 rows could not run, 0 were left out'
    *_, line = gpu.table('model | step', report['steps'][:1], gpu.step_cells)
    assert line == f'| {compiled.label} | RuntimeError: no C++ compiler / found |'


def test_time_is_up_in_the_middle_of_a_row(gpu):
    def endless():
        while True:
            try:
                torch.zeros(10).sum()
            except Exception:  # as a compiler may
                pass

    cases = [gpu.Case('flat', 'first', lambda: dict(passed=True)), gpu.Case('flat', 'second', endless)]
    handler = signal.getsignal(signal.SIGALRM)
    report = gpu.measure([*cases, gpu.Case('steps', 'third', endless)], minutes=0.5 / 60)
    assert report['flat'] == [dict(passed=True)]
    assert report['left_out'] == dict(flat=['second'], steps=['third']) and not report['interrupted']
    assert gpu.verdict('flat', report) == 'INCOMPLETE, 0 rows could not run, 1 were left out'
    assert signal.getsignal(signal.SIGALRM) == handler


def test_peak_memory(gpu, monkeypatch):
    # a device that counts: 100 MiB held, 350 at the peak of the step, which an earlier 900 must not hide
    state = SimpleNamespace(peak=900 * MIB)
    device = SimpleNamespace(
        synchronize=lambda: None, memory_allocated=lambda: 100 * MIB, max_memory_allocated=lambda: state.peak,
        reset_peak_memory_stats=lambda: setattr(state, 'peak', 100 * MIB))
    monkeypatch.setattr(torch, 'get_device_module', lambda _: device)
    assert gpu.peak_mib(lambda: setattr(state, 'peak', 350 * MIB), torch.device('cuda')) == 250


def test_switches_are_set_and_set_back(gpu):
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    seen = []
    for precision in gpu.PRECISIONS:
        with gpu.exactness.running_in(precision, CPU):
            autocast = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else None
            seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(), autocast))
    assert seen == [
        (False, 'highest', None), (True, 'highest', None), (True, 'high', None), (True, 'highest', torch.float16),
        (True, 'highest', torch.bfloat16), (True, 'highest', None)]
    assert before == (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision())


def test_only_keys_and_queries_are_scaled(gpu):
    for name in ('test_t2t_vit', 't2t_vit_t_14'):
        model, scaled = (gpu.exactness.load(name, scale=s).patch_embed.state_dict() for s in (1., 3.))
        changed = {k: scaled[k] / model[k] for k in model if not torch.equal(scaled[k], model[k])}
        assert changed and all('kqv' in k or 'qkv' in k for k in changed)
        for ratio in changed.values():
            third = len(ratio) // 3
            assert torch.allclose(ratio[:2 * third], torch.tensor(3.)) and (ratio[2 * third:] == 1).all()


@pytest.mark.parametrize('args, sentence', [
    ([], 'python benchmarks/gpu.py --device cpu --quick'),
    (['--device', 'toaster'], 'finds no device "toaster"'),
    (['--minutes', '0'], 'give a number above 0'),
    (['--json', 'missing/figures.json'], 'cannot be written'),
])
def test_mistakes_are_told_in_a_sentence(run, monkeypatch, capsys, args, sentence):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert run(*args) == 2
    out, err = capsys.readouterr()
    assert sentence in err and not out
