"""Speed of this package's models against timm's, as ratios in one run.

    python benchmarks/speed.py [--pairs MODEL:REFERENCE ...] [--batch-size 16] [--amp] [--channels-last]
                               [--json FILE] [--png FILE]

A model may carry +compile (torch.compile in one graph) or +dynamic (the same for any batch), so that
`t2t_vit_14+compile:t2t_vit_14` compares it with itself.

The two models of a pair take turns, a step each a round; the table gives each one's median over the rounds, in
milliseconds per image, and the median, lowest and highest of the rounds' ratios. Forward runs under inference_mode in
eval mode; a training step is forward, backward and zero_grad, no optimizer.
"""
import argparse
import json
import platform
from functools import partial
from typing import Callable, Dict, List

import timm
import torch
from pairs import compare, make_step, seconds

DEFAULT_PAIRS = [
    't2t_vit_14:deit_small_patch16_224',
    't2t_vit_7:deit_tiny_patch16_224',
    't2t_vit_14:vit_little_patch16_reg1_gap_256',
    't2t_vit_t_14:deit_small_patch16_224',
]


def make_timer(args: argparse.Namespace, model_name: str, train: bool) -> Callable[[], float]:
    """Return a function that times one step of a model on a batch of its own, warmed up."""
    name, *modes = model_name.split('+')
    model = timm.create_model(name).train(train)
    size = model.default_cfg['input_size'][-1]
    x = torch.randn(args.batch_size, 3, size, size)
    if args.channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    run = model
    if 'compile' in modes or 'dynamic' in modes:
        run = torch.compile(model, fullgraph=True, dynamic='dynamic' in modes)
    step = make_step(model, x, train, torch.bfloat16 if args.amp else None, run)
    for _ in range(2):
        step()
    return partial(seconds, step)


def compare_pair(args: argparse.Namespace, pair: str, train: bool) -> Dict[str, object]:
    """Return a row of the table: medians and ratios of a pair."""
    names = pair.split(':')
    timers = [make_timer(args, name, train) for name in names]
    return dict(
        model=names[0], reference=names[1], step='training' if train else 'forward',
        **compare(timers, args.rounds, args.batch_size))


def draw(rows: List[Dict[str, object]], title: str, path: str) -> None:
    """Draw the ratios of every round, and their median, a line a row of the table."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 1.2 + 0.45 * len(rows)), layout='constrained')
    axes = figure.subplots()
    for y, row in enumerate(rows):
        axes.plot(row['rounds'], [y] * len(row['rounds']), 'o', color='tab:blue', alpha=0.35, markeredgewidth=0)
        axes.plot(row['ratio'], y, '|', color='black', markersize=16, markeredgewidth=2)
        axes.annotate(f'{row["ratio"]:.2f}', (row['ratio'], y), (0, 9), textcoords='offset points', ha='center')
    axes.axvline(1., color='gray', linewidth=1)
    labels = [f'{row["model"]}, {row["step"]}\nagainst {row["reference"]}' for row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.8)
    axes.set_xlabel('time of a step over the reference\'s: each round, and the median')
    axes.set_title(title, fontsize=10)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--pairs', nargs='+', default=DEFAULT_PAIRS, metavar='MODEL:REFERENCE')
    parser.add_argument('--steps', nargs='+', default=['forward', 'training'], choices=['forward', 'training'])
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--rounds', type=int, default=7)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--json', help='write the figures to this file too')
    parser.add_argument('--png', help='draw the ratios to this file too (needs matplotlib)')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    modes = [mode for mode in ('amp', 'channels_last') if getattr(args, mode)]
    title = ', '.join([
        f'torch {torch.__version__}', f'timm {timm.__version__}', platform.machine(), f'{args.threads} threads',
        f'batch {args.batch_size}', f'{args.rounds} rounds', *modes])
    print(title)
    print(f'{"model":20}{"reference":34}{"step":10}{"ms/image":>10}{"reference":>11}{"ratio":>8}  lowest highest')
    rows = []
    for pair in args.pairs:
        for step in args.steps:
            row = compare_pair(args, pair, train=step == 'training')
            rows.append(row)
            ours, theirs = row['ms_per_image']
            print(f'{row["model"]:20}{row["reference"]:34}{step:10}{ours:10.2f}{theirs:11.2f}{row["ratio"]:8.3f}'
                  f'{row["lowest"]:8.2f}{row["highest"]:8.2f}', flush=True)
    if args.json:
        with open(args.json, 'w') as f:
            json.dump(dict(vars(args), torch=torch.__version__, timm=timm.__version__, rows=rows), f, indent=1)
    if args.png:
        draw(rows, title, args.png)


if __name__ == '__main__':
    main()
