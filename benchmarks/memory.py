"""Peak memory, and time, of a forward pass and of a training step against image size, each case in a fresh process.

    python benchmarks/memory.py [--models ...] [--img-size 224 384 ...] [--batch-size 16] [--grad-checkpointing]

Prints the peak of the resident set above what the process held before the first step (weights made, input made), in
MiB, and the median time of three steps, in ms per image. A forward pass runs under inference_mode in eval mode; a
training step is forward, backward and zero_grad, no optimizer. Linux only.
"""
import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from typing import Callable, Tuple

DEFAULT_MODELS = ['deit_small_patch16_224', 't2t_vit_14', 't2t_vit_t_14', 'deit_tiny_patch16_224', 't2t_vit_7']
STEPS = ('forward', 'training', 'checkpointing')


def resident_mib() -> float:
    """Return the resident set of this process, in MiB (Linux)."""
    with open('/proc/self/statm') as f:
        return int(f.read().split()[1]) * 4096 / 2 ** 20


class PeakMemory(threading.Thread):
    """Samples the resident set every 2 ms; the kernel's own high-water mark would count what came before."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0.
        self.stopped = threading.Event()

    def run(self):
        while not self.stopped.wait(.002):
            self.peak = max(self.peak, resident_mib())


def make_step(args: argparse.Namespace, name: str, img_size: int, kind: str) -> Callable[[], None]:
    """Return a function that runs one step of a model."""
    import timm
    import torch
    torch.set_num_threads(args.threads)
    model = timm.create_model(name, img_size=img_size).train(kind != 'forward')
    model.set_grad_checkpointing(kind == 'checkpointing')
    x = torch.randn(args.batch_size, 3, img_size, img_size)

    def step() -> None:
        if kind == 'forward':
            with torch.inference_mode():
                model(x)
        else:
            model(x).sum().backward()
            model.zero_grad()

    return step


def measure(args: argparse.Namespace, name: str, img_size: int, kind: str) -> Tuple[float, float]:
    """Return the peak of one case in MiB over the idle process, and its time in ms per image."""
    step = make_step(args, name, img_size, kind)
    idle = resident_mib()
    peak = PeakMemory()
    peak.start()
    seconds = []
    for _ in range(4):
        begin = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begin)
    peak.stopped.set()
    peak.join()
    return max(peak.peak, resident_mib()) - idle, 1e3 * statistics.median(seconds[1:]) / args.batch_size


def main() -> None:
    """Measure every model at every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=DEFAULT_MODELS)
    parser.add_argument('--img-size', nargs='+', type=int, default=[224])
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--grad-checkpointing', action='store_true', help='also train with gradient checkpointing')
    parser.add_argument('--case', nargs=3, help=argparse.SUPPRESS)
    parser.add_argument('--json', help='write the figures to this file too')
    args = parser.parse_args()
    if args.case:
        print(*measure(args, args.case[0], int(args.case[1]), args.case[2]))
        return

    steps = STEPS if args.grad_checkpointing else STEPS[:2]
    print(f'peak MiB over the idle process, ms per image; batch {args.batch_size}, {args.threads} threads')
    print(f'{"model":26}{"size":>5}' + ''.join(f'{step:>24}' for step in steps))
    rows = []
    for img_size in args.img_size:
        for name in args.models:
            row = dict(model=name, img_size=img_size)
            for step in steps:
                command = [sys.executable, __file__, '--batch-size', str(args.batch_size)]
                command += ['--threads', str(args.threads), '--case', name, str(img_size), step]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                row[step] = [float(figure) for figure in out.split()]
            rows.append(row)
            cells = (f'{row[step][0]:12.0f} MiB{row[step][1]:8.1f}' for step in steps)
            print(f'{name:26}{img_size:5}' + ''.join(cells), flush=True)
    if args.json:
        with open(args.json, 'w') as f:
            json.dump(dict(vars(args), rows=rows), f, indent=1)


if __name__ == '__main__':
    main()
