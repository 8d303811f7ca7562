"""T2T-ViT on a GPU: exactness on flat images, range in half precision, time and memory against DeiT.

    python benchmarks/gpu.py [--minutes 5] [--json t2t_timm_gpu.json] [--no-compile]
    python benchmarks/gpu.py --device cpu --quick      small models, to see what it does without a GPU

Prints tables in Markdown and writes the same figures as JSON; paste both into an issue. The most telling rows come
first and compiled models last; rows for which there was no time are named, and Ctrl-C prints what there is.

Exactness: logits against the equations in float64 on the CPU, the largest difference over the largest logit of an
image, with deterministic weights of a trained model's scale (benchmarks/exactness.py). Time: two models take turns, a
ratio is the median of the rounds' own; forward is in eval mode, a training step is forward, backward and zero_grad.
Memory: the peak of a training step above what was allocated before it.

Exit status: 0 if every check passed, 1 if one failed or could not run, 2 without a device, 130 after Ctrl-C.
"""
import argparse
import itertools
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from functools import lru_cache, partial
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import exactness
import timm
import torch
from exactness import HALF_PRECISIONS, PRECISIONS
from pairs import compare, make_step, seconds

import t2t_timm

DEIT_S, DEIT_TI = 'deit_small_patch16_224', 'deit_tiny_patch16_224'
AMP = {'float16': torch.float16, 'float32': None, 'bfloat16': torch.bfloat16}  # the most telling first
# the ratios to reach under float16 autocast at batch 256, forward and training
GOALS = {'t2t_vit_14': (1.15, 1.2), 't2t_vit_7': (1.2, 1.2), 't2t_vit_t_14': (1.25, 1.25)}


class Plan(NamedTuple):
    """What is measured."""
    flat: Tuple[Tuple[str, int], ...] = (('t2t_vit_14', 3), ('t2t_vit_t_14', 3), ('t2t_vit_7', 1))  # in_chans
    pure: Tuple[str, ...] = ('t2t_vit_14',)  # has rows without autocast: they need float64 logits of their own
    ranges: Tuple[str, ...] = ('t2t_vit_14', 't2t_vit_t_14')
    pairs: Tuple[Tuple[str, str], ...] = (('t2t_vit_14', DEIT_S), ('t2t_vit_7', DEIT_TI), ('t2t_vit_t_14', DEIT_S))
    batches: Tuple[int, ...] = (256, 64, 1)
    rounds: int = 7
    seconds: float = 0.1  # of a model's turn


QUICK = Plan(
    flat=(('test_t2t_vit', 3), ('test_t2t_vit', 1)), pure=('test_t2t_vit',), ranges=('test_t2t_vit',),
    pairs=(('test_t2t_vit', 'test_vit'),), batches=(2, 1), rounds=3, seconds=0.01)


class Case(NamedTuple):
    """A row to measure."""
    section: str
    label: str
    run: Callable[[], Dict[str, object]]


class OutOfTime(BaseException):
    """The time is up in the middle of a row; no Exception, so that no compiler reports it as its own failure."""


@lru_cache(maxsize=None)
def timed_model(name: str, device: torch.device) -> torch.nn.Module:
    """Return a model to time; every row uses the same one."""
    torch.manual_seed(0)
    return timm.create_model(name).to(device)


def peak_mib(step: Callable[[], None], device: torch.device) -> Optional[float]:
    """Return the peak of the memory that a step allocates, in MiB; None where the device does not count it."""
    module = torch.get_device_module(device)
    if not hasattr(module, 'max_memory_allocated'):
        return None
    module.synchronize()
    module.reset_peak_memory_stats()
    held = module.memory_allocated()
    step()
    module.synchronize()
    return (module.max_memory_allocated() - held) / 2 ** 20


def time_pair(
        plan: Plan, names: Tuple[str, str], train: bool, amp: str, compiled: bool, batch: int, device: torch.device,
) -> Dict[str, object]:
    """Return a row: time and memory of a step of two models that take turns."""
    synchronize = torch.get_device_module(device).synchronize
    models = [timed_model(name, device) for name in names]
    timers, peaks = [], []
    torch.compiler.reset()
    try:
        for model in models:
            size = model.default_cfg['input_size'][-1]
            run = torch.compile(model, dynamic=False) if compiled else model
            step = make_step(model, torch.randn(batch, 3, size, size, device=device), train, AMP[amp], run)
            for _ in range(2):
                step()
            peaks.append(peak_mib(step, device) if train else None)
            repeats = int(plan.seconds / seconds(step, 1, synchronize))
            timers.append(partial(seconds, step, min(max(repeats, 1), 100), synchronize))
        figures = compare(timers, plan.rounds, batch)
    finally:
        for model in models:  # gradients that a failed step left would take the next row's memory
            model.zero_grad()
    row = dict(
        model=names[0], reference=names[1], step='training' if train else 'forward', amp=amp, compiled=compiled,
        batch=batch, **figures)
    if (amp, compiled, batch) == ('float16', False, 256):
        row['goal'] = GOALS[names[0]][train]
    if None not in peaks:
        row['peak_mib'] = peaks
    return row


def make_cases(plan: Plan, device: torch.device, compiled: bool) -> List[Case]:
    """Return the rows to measure, the most telling first."""
    flat = [
        Case('flat', f'{name}, in_chans {chans}, {p.name}', partial(exactness.flat_images, name, chans, p, device))
        for name, chans in plan.flat for p in PRECISIONS
        if p.dtype == torch.float32 or (name in plan.pure and chans == 3)]
    ranges = [
        Case('range', f'{name}, {regime}, {p.name}', partial(exactness.value_range, name, regime, p, device))
        for name in plan.ranges for regime in ('normal', 'large_norm') for p in HALF_PRECISIONS]
    timed = [
        Case(
            'steps', f'{names[0]} / {names[1]}, {"training" if train else "forward"}, {amp}, batch {batch}'
            + ', compiled' * mode, partial(time_pair, plan, names, train, amp, mode, batch, device))
        for mode, batch, amp, names, train in itertools.product(
            (False, True)[:1 + compiled], plan.batches, AMP, plan.pairs, (False, True))]
    first, block = len(PRECISIONS), 2 * len(plan.pairs)
    return flat[:first] + timed[:block] + ranges + flat[first:] + timed[block:]


def measure(cases: List[Case], minutes: float) -> Dict[str, object]:
    """Run the cases while there is time; return their rows by section, and what was left out."""
    report = dict(flat=[], range=[], steps=[], left_out={}, interrupted=False)
    begin = time.monotonic()
    deadline = begin + 60 * minutes

    def out_of_time(*_) -> None:
        raise OutOfTime

    if hasattr(signal, 'SIGALRM'):  # elsewhere the last row may take longer
        handler = signal.signal(signal.SIGALRM, out_of_time)
        signal.setitimer(signal.ITIMER_REAL, 60 * minutes)
    try:
        for i, case in enumerate(cases):
            if time.monotonic() > deadline:
                raise OutOfTime
            print(
                f'[{time.monotonic() - begin:4.0f} s of {60 * minutes:.0f}, row {i + 1} of {len(cases)}] {case.label}',
                file=sys.stderr, flush=True)
            try:
                row = case.run()
            except torch.OutOfMemoryError:
                row = dict(label=case.label, failed='out of memory')
            except Exception as e:  # a compiler's failure, a dtype that the device lacks: a row that says so
                row = dict(label=case.label, failed=f'{type(e).__name__}: {e}'.strip().splitlines()[0][:200])
            report[case.section].append(row)
    except (OutOfTime, KeyboardInterrupt) as e:
        report['interrupted'] = isinstance(e, KeyboardInterrupt)
        for case in cases[i:]:
            report['left_out'].setdefault(case.section, []).append(case.label)
    finally:
        if hasattr(signal, 'SIGALRM'):
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
    report['minutes'] = (time.monotonic() - begin) / 60
    return report


def cpu_name() -> str:
    """Return the CPU's name where the system tells it: the time of a small batch on a GPU depends on it."""
    try:
        with open('/proc/cpuinfo') as f:
            return next(line.partition(': ')[2].strip() for line in f if line.startswith('model name'))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment(device: torch.device) -> Dict[str, object]:
    """Return what the figures depend on."""
    driver = None
    if shutil.which('nvidia-smi'):
        query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        driver = subprocess.run(query, capture_output=True, text=True).stdout.strip().partition('\n')[0]
    module = torch.get_device_module(device)
    name = module.get_device_name() if hasattr(module, 'get_device_name') else device.type.upper()
    return dict(
        device=name, driver=driver, cuda=torch.version.cuda if device.type == 'cuda' else None, hip=torch.version.hip,
        torch=torch.__version__, timm=timm.__version__, t2t_timm=t2t_timm.__version__, python=platform.python_version(),
        cpu=f'{cpu_name()}, {torch.get_num_threads()} threads',
        tf32_by_default=dict(
            convolutions=torch.backends.cudnn.allow_tf32, matmul_precision=torch.get_float32_matmul_precision()),
        tf32_rounding=exactness.tf32_rounding(device))


def verdict(section: str, report: Dict[str, object]) -> str:
    """Return PASS, FAIL or INCOMPLETE, and of how many rows."""
    rows = report[section]
    wrong = sum(row.get('passed') is False for row in rows)
    failed = sum('failed' in row for row in rows)
    left_out = len(report['left_out'].get(section, []))
    if wrong:
        return f'FAIL, {wrong} of {len(rows)} rows are over their threshold or not finite'
    if failed or left_out:
        return f'INCOMPLETE, {failed} rows could not run, {left_out} were left out'
    return f'PASS, all of {len(rows)} rows'


def table(header: str, rows: List[Dict[str, object]], cells: Callable[[Dict[str, object]], List[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table; a row that could not run says why."""
    names = header.split(' | ')
    yield f'| {header} |'
    yield '| --- ' * len(names) + '|'
    for row in rows:
        line = [row['label'], row['failed'].replace('|', '/')] if 'failed' in row else cells(row)
        yield '| ' + ' | '.join(line + [''] * (len(names) - len(line))) + ' |'


def passed(row: Dict[str, object]) -> str:
    return 'pass' if row['passed'] else '**FAIL**'


def flat_cells(row: Dict[str, object]) -> List[str]:
    name = row['model'] + f', in_chans {row["in_chans"]}' * (row['in_chans'] != 3)
    return [
        name, row['precision'], f'{row["error"]:.1e}', f'{row["threshold"]:.0e}', passed(row), row['image'],
        f'{row["other_class"]} of {len(row["errors"])}']


def range_cells(row: Dict[str, object]) -> List[str]:
    found = [', '.join(what) or 'finite' for what in row['not_finite'].values()]
    return [row['model'], row['regime'], row['precision'], *found, passed(row)]


def step_cells(row: Dict[str, object]) -> List[str]:
    peaks = row.get('peak_mib')
    memory = [*(f'{mib:.0f}' for mib in peaks), f'{peaks[0] / peaks[1]:.2f}'] if peaks else []
    return [
        row['model'], row['reference'], row['step'], row['amp'], 'compiled' if row['compiled'] else 'eager',
        str(row['batch']), *(f'{ms:.3f}' for ms in row['ms_per_image']), f'{row["ratio"]:.2f}',
        f'{row["lowest"]:.2f} to {row["highest"]:.2f}', f'{row["goal"]:.2f}' if 'goal' in row else '', *memory]


def markdown(report: Dict[str, object]) -> str:
    """Return the report as Markdown."""
    about = report['environment']
    moved, defaults = about['tf32_rounding'], about['tf32_by_default']
    tf32 = (f'TF32 moves a convolution by {moved["convolution"]:.0e} and a matrix product by {moved["product"]:.0e}'
            if any(moved.values()) else 'this device has no TF32: rows with it repeat float32')
    versions = ', '.join(f'{k} {about[k]}' for k in ('driver', 'cuda', 'hip', 'torch', 'timm', 't2t_timm') if about[k])
    lines = [
        f'## T2T-ViT on {about["device"]}', '',
        f'{versions}, CPU {about["cpu"]}; {tf32} (at the start: convolutions {defaults["convolutions"]}, matmul '
        f'precision {defaults["matmul_precision"]}). {report["minutes"]:.1f} minutes'
        + ', interrupted' * report['interrupted'] + '.', '',
        f'**Flat images: {verdict("flat", report)}.** Logits against float64, the worst of the images:', '',
        *table('model | precision | error | threshold | | image | other class', report['flat'], flat_cells), '',
        f'**Range: {verdict("range", report)}.** What is NaN or inf with keys and queries scaled:', '',
        *table('model | weights | precision | x 1 | x 3 | x 10 | ', report['range'], range_cells), '',
        '**Time and memory.** ms per image of the model and of the reference, ratio as the median of the rounds; peak '
        'MiB of a training step, empty where the device does not count it:', '',
        *table(
            'model | reference | step | precision | mode | batch | ms | ms, reference | ratio | lowest to highest '
            '| goal | MiB | MiB, reference | ratio', report['steps'], step_cells)]
    left_out = [label for labels in report['left_out'].values() for label in labels]
    if left_out:
        lines += ['', f'Left out, {len(left_out)} rows: ' + '; '.join(left_out) + '.']
    return '\n'.join(lines)


def rounded(value: object) -> object:
    """Return a value for JSON: floats of four digits, None where they are not finite."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    if isinstance(value, float):
        return float(f'{value:.4g}') if math.isfinite(value) else None
    return value


def open_device(name: str) -> torch.device:
    """Return the device to measure on; exit with a sentence if torch has none."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):  # torch without CUDA asserts
        print(
            f'torch {torch.__version__} finds no device "{name}" here; to see what this command does without a GPU: '
            'python benchmarks/gpu.py --device cpu --quick', file=sys.stderr)
        sys.exit(2)
    if device.index is not None:
        torch.get_device_module(device).set_device(device)
    return device


def main() -> None:
    """Measure, print the tables and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda', help="a device of torch's; by default cuda")
    parser.add_argument('--minutes', type=float, default=5., help='the time budget; by default 5')
    parser.add_argument('--json', default='t2t_timm_gpu.json', help='the file of the figures; by default %(default)s')
    parser.add_argument('--quick', action='store_true', help='small models and batches, not compiled')
    parser.add_argument(
        '--compile', action=argparse.BooleanOptionalAction, help='also time compiled models; by default unless --quick')
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error(f'--minutes {args.minutes:g} leaves no time: give a number above 0')
    if os.path.isdir(args.json) or not os.access(os.path.dirname(args.json) or '.', os.W_OK):
        parser.error(f'{args.json} cannot be written: give a file in a folder that you may write to')
    device = open_device(args.device)

    compiled = not args.quick if args.compile is None else args.compile
    about = environment(device)
    report = measure(make_cases(QUICK if args.quick else Plan(), device, compiled), args.minutes)
    report = dict(environment=about, verdict={s: verdict(s, report) for s in ('flat', 'range')}, **report)
    with open(args.json, 'w') as f:
        json.dump(rounded(report), f, indent=1)
    print(markdown(report))
    print(f'\nThe same figures: {args.json}', file=sys.stderr)
    good = all(v.startswith('PASS') for v in report['verdict'].values())
    sys.exit(130 if report['interrupted'] else 0 if good else 1)


if __name__ == '__main__':
    main()
