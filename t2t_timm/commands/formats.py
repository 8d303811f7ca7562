"""The formats that a model can be exported to: what each needs, and how it is written, quantized and run."""
import errno
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_model_data_config

from ..errors import UserError
from ..models import T2TViT
from .classify import class_names
from .constants import fold_constants, split_linear_maps
from .quantize import Calibration, Run, quantize_onnx, quantize_openvino, quiet

__all__ = ['DYNAMO_OPSET', 'FORMATS', 'MIN_SIZE', 'OPSET', 'Format', 'Source']

OPSET = 20
ATTENTION_OPSET = 23  # which has attention as one operator
DYNAMO_OPSET = 18  # below, onnx's converter fails (Pad), and torch's older exporter writes the graph
MIN_SIZE = 32  # pixels; below, the grid has one row, which the exporters would have to treat apart
MAX_SIZE = 4096
MAX_BATCH = 4096


class _InFloat16(torch.nn.Module):
    """Computes in float16, from float32 to float32."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model.half()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x.half()).float()


@dataclass
class Source:
    """A model to be exported, and the graphs of it that formats are made from."""
    model: T2TViT  # in float32, for evaluation, on the CPU
    example: torch.Tensor  # images that the exporters trace it with
    folder: Path  # temporary, for what is made on the way
    opset: int  # of ONNX graphs
    half: bool  # write a file in float16

    def program(
            self, for_runtimes: bool = False, written_out: bool = False, half: bool = False,
    ) -> torch.export.ExportedProgram:
        """Return the model as torch.export gives it, its weights folded.

        Args:
            for_runtimes: With linear maps as `split_linear_maps` makes them.
            written_out: With attention as products and a softmax: around one operator, exporters write shape arithmetic
                and masks.
            half: Compute in float16.
        """
        model: Any = deepcopy(self.model)
        for module in model.modules():
            if written_out and hasattr(module, 'fused_attn'):
                module.fused_attn = False
        program = torch.export.export(
            _InFloat16(model) if half else model, (self.example,), dynamic_shapes=self._sizes(), strict=False)
        if for_runtimes:
            program = split_linear_maps(program)
        fold_constants(program)
        return program

    def _sizes(self) -> dict[str, Any] | None:
        """Return the sizes that stay free, with their names."""
        if len(self.example) == 1:  # a size of 1 is a constant
            return None
        shapes = {0: torch.export.Dim('batch', max=MAX_BATCH)}
        if self.model.dynamic_img_size:
            shapes[2] = torch.export.Dim('height', min=MIN_SIZE, max=MAX_SIZE)
            shapes[3] = torch.export.Dim('width', min=MIN_SIZE, max=MAX_SIZE)
        return {'x': shapes}

    def onnx_file(self, input_name: str = 'x', half: bool = False) -> Path:
        """Return an ONNX file, which is made once.

        Args:
            input_name: Name of the images.
            half: Compute in float16.
        """
        import onnx
        import onnx_ir
        file, images = self.folder / 'graph.onnx', (self.example,)
        if file.exists():
            return file
        options: dict[str, Any] = dict(opset_version=self.opset, input_names=[input_name], output_names=['logits'])
        with quiet():  # they tell of each constant, the older one of each size that it takes for one
            if self.opset < DYNAMO_OPSET:
                axes = {name: {0: 'batch'} for name in (input_name, 'logits')}
                torch.onnx.export(self.model, images, str(file), dynamo=False, dynamic_axes=axes, **options)
                return file
            exported: Any = torch.onnx.export(
                self.program(True, self.opset < ATTENTION_OPSET, half), images, dynamo=True,
                dynamic_shapes=self._sizes(), verbose=False, **options)
        proto = onnx_ir.to_proto(exported.model)
        del proto.graph.value_info[:]  # with the names of free sizes, a runtime that fixes them refuses the file
        onnx.save(proto, file)
        return file


class Format(NamedTuple):
    """What export knows of a format."""
    suffixes: tuple[str, ...]  # ends of a file's name, the usual one first; none for a folder
    write: Callable[[Source, Path], Any]
    run: Callable[[Path], Run]  # runs what was written
    packages: tuple[str, ...] = ()  # that it needs
    quantize: Callable[[Source, Path, Calibration], Any] | None = None  # makes what was written an int8 model
    quantize_packages: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # that only some formats take
    is_fixed: bool = False  # for one image at a time, of one size


def _run_onnx(file: Path) -> Run:
    import onnxruntime
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(['logits'], {name: x.numpy()})[0])


def _convert_to_openvino(onnx_file: Path):
    import openvino
    from openvino import opset11
    ov_model = openvino.convert_model(onnx_file)
    for op in ov_model.get_ordered_ops():
        # the position table, of images of any size: OpenVINO's 'cubic' ignores antialias, Pillow's is torch's
        if op.get_type_name() == 'Interpolate' and op.get_attributes()['mode'] == 'cubic':
            resized = opset11.interpolate(
                op.input_value(0), op.input_value(1), 'bicubic_pillow', 'sizes', cube_coeff=-0.5)
            op.output(0).replace(resized.output(0))
    ov_model.validate_nodes_and_infer_types()
    return ov_model


def _write_openvino(source: Source, file: Path) -> None:
    import openvino
    openvino.save_model(_convert_to_openvino(source.onnx_file()), file, compress_to_fp16=source.half)


def _run_openvino(file: Path) -> Run:
    import openvino
    compiled = openvino.compile_model(str(file), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda x: torch.from_numpy(compiled([x.numpy()])[0].copy())


def _quantize_openvino(source: Source, file: Path, calibration: Calibration) -> None:
    import openvino
    onnx_file = source.onnx_file()
    quantized = quantize_openvino(_convert_to_openvino(onnx_file), onnx_file, calibration)
    openvino.save_model(quantized, file, compress_to_fp16=False)


def _save(save: Callable[[io.BytesIO], Any], file: Path) -> None:
    """Write what torch saves; it ends the process if it finds the disk full."""
    buffer = io.BytesIO()
    save(buffer)
    # A view of the buffer that an error keeps alive crashes Python 3.12.1 (cpython issue 111049).
    file.write_bytes(buffer.getvalue())


@contextmanager
def _temporary_files() -> Iterator[None]:
    """Tell if there is no room for the system's temporary files, where those of the compiler and its packages are."""
    try:
        yield
    except Exception as e:
        full = os.strerror(errno.ENOSPC) in str(e) or shutil.disk_usage(gettempdir()).free < 1 << 20
        if not full or getattr(e, 'filename', None):
            raise
        raise UserError(
            f'{gettempdir()} has no room left for the temporary files of AOTInductor: make room there, or name '
            'another folder in TMPDIR.') from e


def _write_aoti(source: Source, file: Path) -> None:
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as e:
        raise UserError('AOTInductor needs a C++ compiler: install g++ or clang++, or name one in CXX.') from e
    with _temporary_files(), TemporaryDirectory() as tmp:
        shutil.copyfile(aoti_compile_and_package(source.program(), package_path=f'{tmp}/model.pt2'), file)


def _run_aoti(file: Path) -> Run:
    from torch._inductor import aoti_load_package
    with _temporary_files():
        return aoti_load_package(str(file))


def _write_torchscript(source: Source, file: Path) -> None:
    with quiet():  # TorchScript is what was asked for, though it is deprecated
        _save(partial(torch.jit.save, torch.jit.script(source.model)), file)


def _run_torchscript(file: Path) -> Run:
    with quiet():
        return torch.jit.load(file)


def _write_executorch(source: Source, file: Path) -> None:
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        program = to_edge_transform_and_lower(
            source.program(written_out=True), partitioner=[XnnpackPartitioner()]).to_executorch()
    file.write_bytes(program.buffer)


# Runs a .pte in a process of its own: its runtime writes to stderr, and may end the process instead of raising.
_RUN_PTE = '''
import sys, numpy, torch
from executorch.runtime import Runtime
file, given, got = sys.argv[1:]
method = Runtime.get().load_program(file).load_method('forward')
numpy.save(got, method.execute([torch.from_numpy(numpy.load(given))])[0].numpy())
'''


def _run_executorch(file: Path) -> Run:
    def run(x: torch.Tensor) -> torch.Tensor:
        given, got = file.with_name('given.npy'), file.with_name('got.npy')
        np.save(given, x.numpy())
        done = subprocess.run(
            [sys.executable, '-c', _RUN_PTE, file, given, got], capture_output=True, text=True, cwd=file.parent)
        if done.returncode:
            raise UserError(
                f'The runtime of ExecuTorch cannot run the file (exit code {done.returncode}); nothing was written. '
                f'{done.stderr.strip().rpartition(chr(10))[2]}')
        return torch.from_numpy(np.load(got))
    return run


def _write_transformers_js(source: Source, folder: Path) -> None:
    model = source.model
    config = resolve_model_data_config(model)
    (height, width), crop_mode = model.patch_embed.img_size, config['crop_mode']
    if model.in_chans != 3 or height != width or crop_mode != 'center':
        raise UserError(
            f'transformers.js prepares square RGB images, cut from the centre, for this model; it reads {height} x '
            f'{width} pixels in {model.in_chans} channels, with the crop mode {crop_mode!r}.')
    files = {
        'config.json': dict(
            model_type='vit', architectures=['ViTForImageClassification'], id2label=dict(enumerate(class_names(model))),
        ),
        'preprocessor_config.json': dict(
            image_processor_type='ViTImageProcessor',
            do_resize=True,
            size=dict(shortest_edge=math.floor(height / config['crop_pct'])),  # as timm rounds
            resample=getattr(Image.Resampling, config['interpolation'].upper(), Image.Resampling.BICUBIC),
            do_center_crop=True,
            crop_size=dict(height=height, width=width),
            do_rescale=True,
            rescale_factor=1 / 255,
            do_normalize=True,
            image_mean=config['mean'],
            image_std=config['std'],
        ),
    }
    (folder / 'onnx').mkdir(parents=True)
    for name, what in files.items():
        (folder / name).write_text(json.dumps(what, indent=2) + '\n')
    shutil.copyfile(source.onnx_file('pixel_values'), folder / 'onnx' / 'model.onnx')


_ONNX = ('onnx', 'onnxscript', 'onnxruntime')
FORMATS = {
    'onnx': Format(
        ('.onnx',),
        write=lambda source, file: shutil.copyfile(source.onnx_file(half=source.half), file),
        run=_run_onnx,
        packages=_ONNX,
        quantize=lambda source, file, calibration: quantize_onnx(source.onnx_file(), file),
        options=('--opset', '--quantize int8', '--dtype float16')),
    'openvino': Format(
        ('.xml',),
        write=_write_openvino,
        run=_run_openvino,
        packages=('openvino', 'onnx', 'onnxscript'),
        quantize=_quantize_openvino,
        quantize_packages=('nncf',),
        options=('--quantize int8', '--dtype float16')),
    'export': Format(
        ('.pt2',),
        write=lambda source, file: _save(partial(torch.export.save, source.program()), file),
        run=lambda file: torch.export.load(file).module()),
    'aoti': Format(('.pt2',), _write_aoti, _run_aoti),
    'torchscript': Format(('.pt', '.pth', '.ts'), _write_torchscript, _run_torchscript),
    'executorch': Format(('.pte',), _write_executorch, _run_executorch, packages=('executorch',), is_fixed=True),
    'transformers.js': Format(
        (),
        write=_write_transformers_js,
        run=lambda folder: _run_onnx(max((folder / 'onnx').iterdir())),  # model_quantized.onnx, once it is there
        packages=_ONNX,
        quantize=lambda source, folder, calibration: quantize_onnx(
            source.onnx_file('pixel_values'), folder / 'onnx' / 'model_quantized.onnx'),
        options=('--quantize int8',)),
}
