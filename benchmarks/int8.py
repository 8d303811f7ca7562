"""int8 against float32 on the CPU: size, speed, agreement of the logits, and accuracy on the held-out digits.

Dynamic quantization of the linear layers by onnxruntime: weights int8, one scale a tensor, activations quantized as
they come. Prints a table in Markdown. Needs the extra onnx.

    python benchmarks/int8.py [MODEL ...]
"""
import argparse
import os
import statistics
import tempfile
import time
import warnings

import onnxruntime
import timm
import torch
from onnxruntime.quantization import quantize_dynamic
from onnxruntime.quantization.shape_inference import quant_pre_process
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from t2t_timm.commands.export import export_model
from t2t_timm.digits import extract_heldout

LINEAR = ['MatMul', 'Gemm']  # what the exporter makes of linear layers; the soft splits' convolutions stay as they are


def quantize(source: str, target: str) -> None:
    """Quantize the linear layers of an ONNX file into another one."""
    prepared = target + '.prepared'
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    quantize_dynamic(prepared, target, op_types_to_quantize=LINEAR)


def session(file: str, threads: int):
    """Return a function that runs an ONNX file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    run = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(run.run(['logits'], {'x': x.numpy()})[0])


def time_together(runs: dict, x: torch.Tensor, repeats: int) -> dict:
    """Return the median milliseconds an image of each function, called in turn so that all meet the same machine."""
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
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with tempfile.TemporaryDirectory() as folder:
        classes = {}
        root = extract_heldout(os.path.join(folder, 'digits'))
        images, targets = [], []
        for path, _, files in sorted(os.walk(root)):
            for file in sorted(files):
                with Image.open(os.path.join(path, file)) as image:
                    images.append(transform(image.convert('RGB')))
                targets.append(classes.setdefault(path, len(classes)))
    return torch.stack(images), torch.tensor(targets)


def accuracy(run, images: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the percentage of images classified right."""
    guesses = torch.cat([run(x).argmax(dim=1) for x in images.split(50)])
    return (guesses == targets).float().mean().item() * 100


@torch.inference_mode()
def measure(name: str, args: argparse.Namespace, folder: str) -> None:
    """Print the rows of a model."""
    torch.manual_seed(0)
    embedded = name == 'test_t2t_vit'
    model = timm.create_model(name, pretrained=embedded).eval()
    files = {kind: os.path.join(folder, f'{name}.{kind}.onnx') for kind in ('float32', 'int8')}
    export_model(model, files['float32'], 'onnx')
    quantize(files['float32'], files['int8'])
    runs = {'float32, torch': model}
    runs.update({f'{kind}, onnxruntime': session(file, args.threads) for kind, file in files.items()})
    sizes = [os.path.getsize(files['float32'])] * 2 + [os.path.getsize(files['int8'])]

    images, targets = digits(model) if embedded else (torch.randn(args.batch, 3, *model.img_size), None)
    x = images[:args.batch]
    times = time_together(runs, x, args.repeats)
    expected = torch.cat([model(part) for part in images.split(50)])
    for (kind, run), size in zip(runs.items(), sizes, strict=True):
        logits = torch.cat([run(part) for part in images.split(50)])
        relative = ((logits - expected).norm() / expected.norm()).item()
        same = (logits.argmax(dim=1) == expected.argmax(dim=1)).float().mean().item() * 100
        top1 = f'{accuracy(run, images, targets):.1f}' if embedded else ''
        print(
            f'| {name} | {kind} | {size / 1e6:.1f} | {times[kind]:.2f} | {times["float32, torch"] / times[kind]:.2f} '
            f'| {relative:.1e} | {same:.1f} | {top1} |', flush=True,
        )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('models', nargs='*', default=['test_t2t_vit', 't2t_vit_7', 't2t_vit_14', 't2t_vit_t_14'])
    parser.add_argument('--batch', type=int, default=8)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--repeats', type=int, default=7)
    args = parser.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(args.threads)
    print(f'batch {args.batch}, {args.threads} thread(s), torch {torch.__version__}, '
          f'onnxruntime {onnxruntime.__version__}\n')
    print('| model | weights | MB | ms/image | speed-up | logits, relative error | same class, % | digits top-1, % |')
    print('| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |')
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            measure(name, args, folder)


if __name__ == '__main__':
    main()
