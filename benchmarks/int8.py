"""int8 against float32 on the CPU: size, speed, agreement of the logits, and accuracy on the held-out digits.

The files are those of `t2t-timm export --quantize int8`. Prints a table in Markdown. Needs the extra onnx or openvino.

    python benchmarks/int8.py CALIBRATION_FOLDER [MODEL ...] [--format onnx|openvino]

Calibrate on images that are not scored: `python tools/make_digits.py OUT` writes digits to train on.
"""
import argparse
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import timm
import torch

from t2t_timm.commands.export import export_model
from t2t_timm.commands.images import ImageReader
from t2t_timm.digits import extract_heldout


def onnx_session(file: str, threads: int):
    """Return a function that runs an ONNX file."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    run = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(run.run(['logits'], {'x': x.numpy()})[0])


def openvino_session(file: str, threads: int):
    """Return a function that runs an OpenVINO model."""
    import openvino
    run = openvino.compile_model(file, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': threads})
    return lambda x: torch.from_numpy(run([x.numpy()])[0].copy())


FORMATS = {'onnx': ('.onnx', onnx_session), 'openvino': ('.xml', openvino_session)}


def time_together(runs: dict, x: torch.Tensor, repeats: int) -> dict:
    """Return the median milliseconds per image of each function, called in turn so that all meet the same machine."""
    times = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run(x)
            if i > 0:  # the first round warms up
                times[name].append((time.perf_counter() - start) * 1e3 / len(x))
    return {name: statistics.median(t) for name, t in times.items()}


def digits(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the held-out digits as the model reads them, and their classes."""
    read = ImageReader(model)
    with tempfile.TemporaryDirectory() as folder:
        files = sorted(Path(extract_heldout(os.path.join(folder, 'digits'))).glob('*/*'))
        return torch.cat([read(str(f)) for f in files]), torch.tensor([int(f.parent.name[0]) for f in files])


@torch.no_grad()
def measure(name: str, args: argparse.Namespace, folder: str) -> None:
    """Print the rows of a model."""
    torch.manual_seed(0)
    embedded = name == 'test_t2t_vit'
    model = timm.create_model(name, pretrained=embedded).eval()
    suffix, session = FORMATS[args.format]
    runs, sizes = {'float32, torch': model}, {}
    for kind, quantize in (('float32', None), ('int8', 'int8')):
        file = os.path.join(folder, f'{name}.{kind}{suffix}')
        done = export_model(model, file, args.format, quantize, args.calibration if quantize else None)
        runs[f'{kind}, {args.format}'] = session(file, args.threads)
        sizes[f'{kind}, {args.format}'] = f'{done.size / 1e6:.1f}'

    images, targets = digits(model) if embedded else (torch.randn(args.batch, 3, *model.patch_embed.img_size), None)
    times = time_together(runs, images[:args.batch], args.repeats)
    expected = torch.cat([model(part) for part in images.split(50)])
    for kind, run in runs.items():
        logits = torch.cat([run(part) for part in images.split(50)])
        guesses = logits.argmax(dim=1)
        relative = ((logits - expected).norm() / expected.norm()).item()
        probability = (logits.softmax(dim=1) - expected.softmax(dim=1)).abs().max().item()
        same = (guesses == expected.argmax(dim=1)).float().mean().item() * 100
        top1 = f'{(guesses == targets).float().mean().item() * 100:.1f}' if embedded else ''
        print(
            f'| {name} | {kind} | {sizes.get(kind, "")} | {times[kind]:.2f} '
            f'| {times["float32, torch"] / times[kind]:.2f} '
            f'| {relative:.1e} | {probability:.3f} | {same:.1f} | {top1} |', flush=True,
        )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('calibration', help='folder of images')
    parser.add_argument('models', nargs='*', default=['test_t2t_vit', 't2t_vit_7', 't2t_vit_14', 't2t_vit_t_14'])
    parser.add_argument('--format', choices=FORMATS, default='onnx')
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--repeats', type=int, default=7)
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(args.threads)
    print(f'batch {args.batch}, {args.threads} thread(s), torch {torch.__version__}\n')
    print('| model | weights | MB | ms/image | speed-up | logits, relative error | probability, largest difference '
          '| same class, % | digits top-1, % |')
    print('| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |')
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            measure(name, args, folder)


if __name__ == '__main__':
    main()
