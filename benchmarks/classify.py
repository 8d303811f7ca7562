"""`t2t-timm classify` against timm's inference.py: the same photos, model, workers and batch size, in one run.

    python benchmarks/classify.py [--inference FILE] [--photos FOLDER] [--model t2t_vit_7] [--workers 2]
                                  [--batch-size 16] [--rounds 3] [--device cpu] [--json FILE]

inference.py is not in timm's wheel: --inference names it in a checkout of pytorch-image-models. Without --photos, 1,000
JPEGs of 500 x 375 pixels are made, 90 kB each on average. The model has random weights. Both programs take turns; the
table gives the lowest wall time of the rounds from start to end, photos per second, and CPU time (of all processes, in
the same round), with imports and the model's creation in all of them.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

COUNT, SIZE = 1000, (500, 375)


def make_photos(folder: Path) -> None:
    """Write photos of smooth shapes and fine grain, so that they are as costly to decode as photographs."""
    folder.mkdir()
    random = np.random.RandomState(0)
    for i in range(COUNT):
        shapes = Image.fromarray(random.randint(0, 256, (6, 8, 3), dtype=np.uint8))
        coarse = shapes.resize(SIZE, Image.Resampling.BICUBIC)
        grain = random.randint(-30, 31, (SIZE[1], SIZE[0], 1))
        pixels = (np.asarray(coarse).astype(int) + grain).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f'{i:04d}.jpg', quality=85)


def measure(command: list[str], cwd: str) -> tuple[float, float]:
    """Return wall and CPU seconds of a command."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--inference', help="timm's inference.py; without it, classify alone is measured")
    parser.add_argument('--photos', type=Path)
    parser.add_argument('--model', default='t2t_vit_7')
    parser.add_argument('--workers', default='2')
    parser.add_argument('--batch-size', default='16')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--json', type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        photos = args.photos.resolve() if args.photos else Path(tmp, 'photos')
        if not args.photos:
            make_photos(photos)
        torch.manual_seed(0)
        save_for_hf(timm.create_model(args.model), f'{tmp}/model', safe_serialization=True)
        options = ['--model', f'local-dir:{tmp}/model', '--workers', args.workers, '--batch-size', args.batch_size,
                   '--device', args.device]
        t2t = [sys.executable, '-m', '_t2t_timm_cli', 'classify', str(photos), *options]
        commands = {'classify': [*t2t, '--csv', '--out', 'ours.csv']}
        if args.inference:
            commands['inference.py'] = [
                sys.executable, os.path.abspath(args.inference), '--data-dir', str(photos), *options, '--topk', '5',
                '--include-index', '--no-console-results', '--results-file', 'theirs.csv']
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(args.rounds):
            for name, command in commands.items():
                times[name].append(measure(command, tmp))
                print(name, *(f'{t:.1f} s' for t in times[name][-1]), file=sys.stderr)
        count = sum(1 for file in photos.rglob('*') if file.is_file())
    print(f'{count} photos, {args.model}, batch {args.batch_size}, {args.workers} workers, '
          f'torch {torch.__version__}, timm {timm.__version__}, {os.cpu_count()} cores, {args.rounds} rounds\n')
    print('| | wall (s) | photos / s | CPU (s) | wall of all rounds |\n| --- | --- | --- | --- | --- |')
    for name, rounds in times.items():
        wall, cpu = min(rounds)
        every = ', '.join(f'{w:.1f}' for w, _ in rounds)
        print(f'| {name} | {wall:.1f} | {count / wall:.1f} | {cpu:.1f} | {every} |')
    if args.json:
        args.json.write_text(json.dumps(times, indent=1), encoding='utf-8')


if __name__ == '__main__':
    main()
