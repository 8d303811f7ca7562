"""Peak memory of a forward pass and of a training step, each case in a fresh process.

    python benchmarks/memory.py [--models ...] [--batch-size 16] [--img-size 224] [--json FILE]

Prints, for each model, the peak of the resident set above what the process held before the first step (weights made,
input made), in MiB, and its ratio to the first model of the list. A forward pass runs under inference_mode in eval
mode; a training step is forward, backward and zero_grad, no optimizer.
"""
import argparse
import json
import subprocess
import sys
import threading

DEFAULT_MODELS = ['deit_small_patch16_224', 't2t_vit_14', 't2t_vit_t_14', 'deit_tiny_patch16_224', 't2t_vit_7']


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


def measure(args: argparse.Namespace, model_name: str) -> float:
    """Return the peak of one case, in MiB over the idle process."""
    import timm
    import torch
    torch.set_num_threads(args.threads)
    kwargs = {} if args.img_size is None else {'img_size': args.img_size}
    model = timm.create_model(model_name, **kwargs).train(args.train)
    model.set_grad_checkpointing(args.grad_checkpointing)
    size = args.img_size or model.default_cfg['input_size'][-1]
    x = torch.randn(args.batch_size, 3, size, size)

    def step():
        if args.train:
            model(x).sum().backward()
            model.zero_grad()
        else:
            with torch.inference_mode():
                model(x)

    idle = resident_mib()
    peak = PeakMemory()
    peak.start()
    for _ in range(2):
        step()
    peak.stopped.set()
    peak.join()
    return max(peak.peak, resident_mib()) - idle


def main() -> None:
    """Measure every model of the list, for inference and for training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=DEFAULT_MODELS)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--img-size', type=int)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--grad-checkpointing', action='store_true')
    parser.add_argument('--train', action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('--case', help=argparse.SUPPRESS)
    parser.add_argument('--json', help='write the figures to this file too')
    args = parser.parse_args()
    if args.case:
        print(measure(args, args.case))
        return

    rows = []
    print(f'{"model":36}{"inference":>12}{"training":>12}  MiB over the idle process, batch {args.batch_size}')
    for name in args.models:
        cases = []
        for train in ([], ['--train']):
            out = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], '--case', name, *train],
                check=True, capture_output=True, text=True)
            cases.append(float(out.stdout))
        rows.append(dict(model=name, inference=cases[0], training=cases[1]))
        print(f'{name:36}{cases[0]:12.0f}{cases[1]:12.0f}', flush=True)
    if args.json:
        with open(args.json, 'w') as f:
            json.dump(dict(vars(args), rows=rows), f, indent=1)


if __name__ == '__main__':
    main()
