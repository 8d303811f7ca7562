"""T2T-ViT over DeiT in the runtimes that people deploy with, on one thread of a CPU: a table in Markdown.

    python benchmarks/runtimes.py [MODEL:REFERENCE ...] [--int8 CALIBRATION_FOLDER] [--batch 1 8] [--rounds 60]

Files of T2T-ViT are those of `t2t-timm export`, DeiT's those of torch's own exporter. All take turns; each cell is the
quotient of the lowest CPU times. Rows whose package is missing are left out. int8 is t2t-timm's own for T2T-ViT and, by
the same calls, for DeiT, of which nothing is left out.
"""
import argparse
import importlib.util
import logging
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
import torch
from int8 import onnx_session, openvino_session

from t2t_timm.commands.export import export_model
from t2t_timm.commands.images import ImageReader

PAIRS = ('t2t_vit_14:deit_small_patch16_224', 't2t_vit_7:deit_tiny_patch16_224', 't2t_vit_t_14:deit_small_patch16_224')


def export_reference(model: torch.nn.Module, file: str) -> None:
    """Write a model by torch's own exporter, for any batch size."""
    shapes = {'x': {0: torch.export.Dim('batch', max=4096)}}
    torch.onnx.export(
        model, (torch.randn(2, *model.default_cfg['input_size']),), dynamo=True, dynamic_shapes=shapes,
        opset_version=20, input_names=['x'], output_names=['logits'], verbose=False,
    ).save(file, external_data=False)


def quantize_reference(file: str, kind: str, images: list[torch.Tensor]) -> str:
    """Write the int8 of DeiT, by the calls that t2t-timm makes of its own models."""
    if kind == 'onnx':
        from onnxruntime.quantization import quantize_dynamic
        from onnxruntime.quantization.shape_inference import quant_pre_process
        quant_pre_process(file, f'{file}.prepared', skip_symbolic_shape=True)
        quantize_dynamic(
            f'{file}.prepared', f'{file}.int8', op_types_to_quantize=['MatMul', 'Gemm'], per_channel=True)
        return f'{file}.int8'
    import nncf
    import openvino
    data = nncf.Dataset([x.numpy() for x in images])
    openvino.save_model(nncf.quantize(openvino.convert_model(file), data), f'{file}.int8.xml')
    return f'{file}.int8.xml'


def executorch_session(file: str) -> Callable:
    """Return a function that runs a program of ExecuTorch."""
    from executorch.runtime import Runtime
    method = Runtime.get().load_program(file).load_method('forward')
    return lambda x: method.execute([x])[0]


def lower_reference(model: torch.nn.Module, file: str) -> None:
    """Write a model for XNNPACK, for one image, as `t2t-timm export` does."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    program = torch.export.export(model, (torch.randn(1, *model.default_cfg['input_size']),))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    Path(file).write_bytes(lowered.to_executorch().buffer)


def sessions(name: str, folder: str, calibration: str | None) -> dict[str, Callable]:
    """Return a function of images for each way to run a model."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval().requires_grad_(False)
    ours = name.startswith('t2t')
    runs: dict[str, Callable] = {'PyTorch eager': model, 'Inductor': torch.compile(model, dynamic=False)}
    file = str(Path(folder) / f'{name}.onnx')
    if ours:
        export_model(model, file)
    else:
        export_reference(model, file)
    files = sorted(str(f) for f in Path(calibration).rglob('*') if f.is_file())[:300] if calibration else []
    data = [ImageReader(model)(f) for f in files]
    if importlib.util.find_spec('onnxruntime'):
        runs['onnxruntime float32'] = onnx_session(file, 1)
        if calibration:
            target = f'{file}.q.onnx'
            if ours:
                export_model(model, target, quantize='int8', calibration=calibration)
            else:
                target = quantize_reference(file, 'onnx', data)
            runs['onnxruntime int8'] = onnx_session(target, 1)
    if importlib.util.find_spec('openvino'):
        runs['OpenVINO float32'] = openvino_session(file, 1)
        if calibration and importlib.util.find_spec('nncf'):
            target = f'{file}.q.xml'
            if ours:
                export_model(model, target, 'openvino', quantize='int8', calibration=calibration)
            else:
                target = quantize_reference(file, 'openvino', data)
            runs['OpenVINO int8'] = openvino_session(target, 1)
    if importlib.util.find_spec('executorch'):
        target = f'{file}.pte'
        if ours:
            export_model(model, target, 'executorch')
        else:
            lower_reference(model, target)
        runs['ExecuTorch XNNPACK'] = executorch_session(target)
    return runs


def lowest(runs: dict[str, Callable], x: torch.Tensor, rounds: int) -> dict[str, float]:
    """Return the lowest milliseconds of CPU time per image of each function; they take turns."""
    best = dict.fromkeys(runs, float('inf'))
    for i in range(rounds + 2):
        for name, run in runs.items():
            start = time.process_time()
            run(x)
            if i > 1:  # the first rounds compile and warm up
                best[name] = min(best[name], (time.process_time() - start) * 1e3 / len(x))
    return best


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('pairs', nargs='*', default=PAIRS)
    parser.add_argument('--int8', metavar='FOLDER', help='images to calibrate and compare int8 with')
    parser.add_argument('--batch', nargs='*', type=int, default=[1, 8])
    parser.add_argument('--rounds', type=int, default=60, help='of batch 1; fewer of larger batches')
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    print(f'torch {torch.__version__}, 1 thread, lowest CPU time of {args.rounds} rounds\n')
    print('| models | runtime | ' + ' | '.join(f'ms, batch {b} | reference | ratio' for b in args.batch) + ' |')
    print('| --- | --- |' + ' ---: | ---: | ---: |' * len(args.batch))
    with TemporaryDirectory() as folder, torch.inference_mode(False), torch.no_grad():
        for pair in args.pairs:
            names = pair.split(':')
            both = [sessions(name, folder, args.int8) for name in names]
            for kind in both[0]:
                cells = []
                for batch in args.batch:
                    if batch > 1 and kind.startswith('ExecuTorch'):  # its files are for one image
                        cells.append(' | | ')
                        continue
                    x = torch.randn(batch, 3, 224, 224)
                    runs = {name: run[kind] for name, run in zip(names, both, strict=True)}
                    ours, theirs = lowest(runs, x, max(6, args.rounds // batch)).values()
                    cells.append(f'{ours:.2f} | {theirs:.2f} | {ours / theirs:.3f}')
                print(f'| {pair} | {kind} | {" | ".join(cells)} |', flush=True)


if __name__ == '__main__':
    main()
