"""Three models through PyTorch's real CUDA code on a device that computes nothing: `make cuda NULLCUDA=FOLDER`.

FOLDER holds the null device: it logs what the CUDA runtime is asked for, and executes none of it. Each model runs in
float16 and bfloat16 autocast, a forward pass and a training step each: eager, captured in a CUDA graph, and compiled.
There must be no synchronization, no copy between devices and no graph break; every Triton kernel must pass ptxas for
sm_80; the numbers of launches and the peak memory must be within 5 % of null_cuda.json, which `ARGS=--record` rewrites.
docs/gpu.md says what this proves. The two dtypes run at the same time, in a process each.
"""
import argparse
import gc
import itertools
import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nullcuda
import timm
import torch
from torch._dynamo.utils import counters

MODELS: dict[str, dict[str, Any]] = {'test_t2t_vit': {}, 't2t_vit_7': {'depth': 2}, 't2t_vit_t_14': {'depth': 2}}
DTYPES = 'float16', 'bfloat16'
BATCH_SIZE = 64
TOLERANCE = 0.05
LAUNCHES = 'KERNEL', 'GEMM', 'CUDNN', 'MEMSET', 'COPY_D2D'
MEMORY = 'MALLOC', 'FREE'
TABLE = Path(__file__).with_suffix('.json')


def make_run(model: torch.nn.Module, mode: str, dtype: str, compiled: bool = False) -> Callable[[], None]:
    """Return a function that runs a forward pass or a training step of a model."""
    size = model.default_cfg['input_size'][-1]
    images = torch.empty(BATCH_SIZE, 3, size, size, device='cuda')
    fn = torch.compile(model, dynamic=False) if compiled else model

    def forward() -> None:
        model.eval()
        with torch.no_grad(), torch.autocast('cuda', getattr(torch, dtype)):
            fn(images)

    def step() -> None:
        model.train()
        with torch.autocast('cuda', getattr(torch, dtype)):
            loss = fn(images).float().sum()
        loss.backward()
        model.zero_grad()

    return forward if mode == 'forward' else step


def measure(run: Callable[[], None], num_triton: Callable[[], int] = lambda: 0) -> tuple[dict[str, int], Counter]:
    """Return launches and peak memory, in MiB, of a run that has been warmed up, and the log by kind of call."""
    gc.collect()  # what the cases before have left would be freed during the run
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held, before = torch.cuda.memory_allocated(), num_triton()
    _, log = nullcuda.log(run)
    kinds = Counter(record[1] for record in log)
    peak = (torch.cuda.max_memory_allocated() - held) >> 20
    return {'launches': sum(kinds[kind] for kind in LAUNCHES) + num_triton() - before, 'peak_mib': peak}, kinds


def unwanted(kinds: Counter, allowed: tuple[str, ...] = LAUNCHES + MEMORY) -> str:
    """Return the calls of a log that are no launch and no allocation, such as copies to the host."""
    return ', '.join(f'{count} {kind}' for kind, count in kinds.items() if kind not in allowed)


def capture(run: Callable[[], None]) -> str:
    """Return what a CUDA graph of a run could not hold, or ''."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()

    def record() -> None:
        with torch.cuda.graph(graph, stream=stream):
            run()

    _, log = nullcuda.log(record)
    kinds = Counter(entry[1] for entry in log if entry[1].startswith('CAPTURING:'))
    # PyTorch itself waits once, on another stream, for the state of its random numbers.
    allowed = tuple(f'CAPTURING:{kind}' for kind in LAUNCHES + MEMORY + ('SYNC_OTHER_STREAM',))
    return unwanted(kinds, allowed) if kinds['CAPTURING:KERNEL'] else 'no kernel was captured'


class Report:
    """Prints a line per case and keeps the figures and the faults; what is expected is None while it is recorded."""

    def __init__(self, expected: dict[str, dict[str, int]] | None) -> None:
        self.expected = expected
        self.figures: dict[str, dict[str, int]] = {}
        self.num_faults = 0

    def add(self, case: str, figures: dict[str, int], *faults: str) -> None:
        """Compare the figures of a case with the recorded ones; a fault that is '' is none."""
        found = [fault for fault in faults if fault]
        recorded = figures if self.expected is None else self.expected.get(case, {})
        for key, value in figures.items():
            if key not in recorded:
                found.append(f'{key} has no recorded value')
            elif abs(value - recorded[key]) > TOLERANCE * recorded[key]:
                found.append(f'{key} was recorded as {recorded[key]}')
        self.figures[case] = figures
        self.num_faults += len(found)
        size = f'{figures["launches"]:5d} launches {figures["peak_mib"]:5d} MiB'
        print(f'{case:42s}', size, '; '.join(found), flush=True)


def run_eager(name: str, mode: str, dtype: str, report: Report) -> None:
    """Run a model eagerly, then into a CUDA graph."""
    run = make_run(timm.create_model(name, **MODELS[name]).cuda(), mode, dtype)
    run()
    figures, kinds = measure(run)
    report.add(f'{name} {mode} {dtype} eager', figures, unwanted(kinds), capture(run))


def run_compiled(name: str, mode: str, dtype: str, report: Report) -> None:
    """Compile a model and run it."""
    torch._dynamo.reset()
    counters.clear()
    before = len(nullcuda.GRAPHS)
    run = make_run(timm.create_model(name, **MODELS[name]).cuda(), mode, dtype, compiled=True)
    run()
    figures, kinds = measure(run, lambda: len(nullcuda.LAUNCHES))
    num_graphs = len(nullcuda.GRAPHS) - before
    report.add(
        f'{name} {mode} {dtype} compiled', figures, unwanted(kinds),
        ', '.join(f'graph break: {reason}' for reason in counters['graph_break']),
        f'{num_graphs} graphs' if num_graphs != {'forward': 1, 'step': 2}[mode] else '')


def compile_kernels() -> str:
    """Return what ptxas says of all Triton kernels so far, as one sentence."""
    folder = Path(nullcuda.BUILD)
    with open(folder / 'kernels.pkl', 'wb') as file:
        pickle.dump({'kernels': dict(enumerate(dict.fromkeys(nullcuda.KERNELS.values())))}, file)
    script = Path(nullcuda.__file__).with_name('cubin.py')
    command = [sys.executable, str(script), str(folder / 'kernels.pkl')]
    out = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'NULLGPU_CC': '80'})
    return (out.stdout.strip() or out.stderr.strip()).splitlines()[-1]


def run_cases(dtype: str, record: bool) -> int:
    """Run all cases of a dtype, write their figures to NULLGPU_DIR, and return the number of faults."""
    report = Report(None if record else json.loads(TABLE.read_text()))
    cases = list(itertools.product(MODELS, ('forward', 'step')))
    for case in cases:
        run_eager(*case, dtype, report)
    nullcuda.mock_inductor()
    for case in cases:
        run_compiled(*case, dtype, report)
    kernels = compile_kernels()
    print(kernels)
    (Path(nullcuda.BUILD) / TABLE.name).write_text(json.dumps(report.figures))
    return report.num_faults + (' 0 failed' not in kernels)


def main() -> int:
    """Run all cases; return 1 if one differs from the table or does what it must not."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--record', action='store_true', help='write the figures into null_cuda.json')
    parser.add_argument('--dtype', choices=DTYPES, help='run this dtype alone, in this process')
    args = parser.parse_args()
    if args.dtype:
        return int(run_cases(args.dtype, args.record) > 0)
    folders = [Path(nullcuda.BUILD) / dtype for dtype in DTYPES]  # each process logs into its own
    command = ['bash', str(Path(nullcuda.__file__).with_name('null.sh')), *sys.argv]
    processes = [
        subprocess.Popen(
            [*command, '--dtype', folder.name], env={**os.environ, 'LD_PRELOAD': '', 'NULLGPU_DIR': str(folder)})
        for folder in folders]
    failed = any([process.wait() for process in processes])
    if args.record and not failed:
        figures = {k: v for folder in folders for k, v in json.loads((folder / TABLE.name).read_text()).items()}
        TABLE.write_text(json.dumps(figures, indent=1) + '\n')
    print('There are faults.' if failed else 'No faults.')
    return int(failed)


if __name__ == '__main__':
    sys.exit(main())
