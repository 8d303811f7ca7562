"""Export to ONNX, OpenVINO, torch.export, AOTInductor and TorchScript; the model is compared before a file is kept."""
import errno
import io
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, NamedTuple

import torch

from ..errors import UserError
from ..files import check_target, folder_beside
from ..models import T2TViT
from .quantize import (
    Agreement,
    Calibration,
    calibration_files,
    measure_agreement,
    quantize_onnx,
    quantize_openvino,
)

__all__ = ['FORMATS', 'OPSET', 'Exported', 'check_arguments', 'export_model']

OPSET = 20
OPSETS = range(16, OPSET + 1)
DYNAMO_OPSET = 18  # below, onnx's converter fails (Pad), and torch's older exporter writes the graph
TESTED_TORCH = '2.14'  # every format and --dynamic; the exporters of older releases do less
TOLERANCE = 1e-4  # largest difference of logits, relative where they are above 1
MIN_SIZE = 32  # pixels; below, the grid has one row, which the exporters would have to treat apart
MAX_SIZE = 4096
MAX_BATCH = 4096

_logger = logging.getLogger(__name__)

Run = Callable[[torch.Tensor], torch.Tensor]


class Exported(NamedTuple):
    """What was written, and how far it is from the model."""
    path: Path
    size: int
    max_diff: float
    shapes: list[tuple[int, ...]]
    agreement: Agreement | None = None  # with an int8 model

    def __str__(self) -> str:
        shapes = ', '.join('x'.join(map(str, shape)) for shape in self.shapes)
        compared = f'largest difference in a logit {self.max_diff:.1e} over {shapes}'
        if self.agreement is not None:
            compared = f'{self.agreement} (before int8: {compared})'
        return f'{self.path}: {self.size / 1e6:.1f} MB; {compared}'


def export_model(
        model: T2TViT,
        path: str | Path,
        format: str = 'onnx',
        quantize: str | None = None,
        calibration: str | Path | None = None,
        opset: int | None = None,
) -> Exported:
    """Export a model through the framework's own exporter, compare the result with the model, and write the file.

    The batch size stays free; so does the image size, from 32 pixels up, of a model made with dynamic_img_size=True
    (TorchScript takes what the model takes).

    Args:
        model: Model to export; it is exported in float32, for evaluation, on the CPU.
        path: File to write; it appears, or is replaced, only if the comparison succeeds. OpenVINO writes NAME.xml and
            NAME.bin.
        format: 'onnx', 'openvino', 'export' (torch.export), 'aoti' (an AOTInductor package for this kind of machine) or
            'torchscript'.
        quantize: 'int8' (ONNX and OpenVINO) or None. The float32 model is compared first.
        calibration: Folder with images for quantize, which the int8 model is compared on. OpenVINO's takes the ranges
            of its activations from them, ONNX's takes them when it runs.
        opset: Opset of the format 'onnx', 16 to 20, by default 20. 16 and 17 are for one image size, without quantize.

    Returns:
        The file, its size in bytes (with NAME.bin), the largest difference in a logit of the float32 model, the shapes
        of the images compared, and the agreement of the int8 model.

    Raises:
        UserError: An unknown format, an opset that the rest does not go with, a missing package or compiler, an
            exporter that is too old for this, no folder to write to, no images to calibrate with, or too large a
            difference.
    """
    path = Path(path)
    check_arguments(path, format, quantize, calibration, opset, model.dynamic_img_size)
    write, suffix = FORMATS[format]
    if opset is not None:
        write = partial(write, opset=opset)
    model = model.float().eval()
    images = _images(model)
    data = None if calibration is None else Calibration(calibration, model)
    with (
        folder_beside(path) as tmp,
        torch.inference_mode(False),
        torch.no_grad(),
    ):
        file = tmp / f'model{suffix}'
        _logger.info(f'Exporting, format {format} ...')
        run = _write(write, model, images[0], str(file), format)
        _logger.info('Comparing it with the model ...')
        max_diff = _compare(model, run, images, format)
        agreement = None
        if data is not None:
            _logger.info('Quantizing it to int8 ...')
            del run
            run = QUANTIZERS[format](str(file), data)
            _logger.info('Comparing it with the model on the images ...')
            agreement = measure_agreement(model, run, data)
        del run  # Windows cannot rename open files, so close the session first.
        size = _keep(file, path)
    return Exported(path, size, max_diff, [tuple(x.shape) for x in images], agreement)


def check_arguments(
        path: str | Path,
        format: str = 'onnx',
        quantize: str | None = None,
        calibration: str | Path | None = None,
        opset: int | None = None,
        dynamic: bool = False,
) -> None:
    """Check what can be checked of the arguments of `export_model` without a model.

    Raises:
        UserError: What `export_model` says of them.
    """
    path = Path(path)
    if format not in FORMATS:
        raise UserError(f"Unknown format {format!r}: use one of {', '.join(FORMATS)}.")
    if quantize not in (None, 'int8'):
        raise UserError(f'Unknown quantization {quantize!r}: use int8.')
    if opset is not None:
        _check_opset(opset, format, quantize, dynamic)
    if quantize and format not in QUANTIZERS:
        raise UserError(f'--quantize int8 is for the formats {" and ".join(QUANTIZERS)}, not for {format}.')
    if quantize and calibration is None:
        raise UserError('--quantize int8 needs --calibration FOLDER, a folder with images.')
    if calibration is not None and not quantize:
        raise UserError('--calibration is for --quantize int8.')
    check_target(path, *SUFFIXES[format])
    if calibration is not None:
        calibration_files(calibration)
    if format == 'openvino':
        if path.suffix != '.xml':
            raise UserError(f'OpenVINO reads NAME.xml with NAME.bin beside it: name a file .xml, not {path.name}.')
        weights = path.with_suffix('.bin')
        if weights.is_dir() or weights.exists() and not path.exists():
            raise UserError(f'{weights} exists and is not the weights of {path.name}: use another name.')
        if quantize:
            _check_packages(('nncf',), 'int8 for OpenVINO')


def _check_opset(opset: int, format: str, quantize: str | None, dynamic: bool) -> None:
    if format != 'onnx':
        raise UserError(f'--opset is for the format onnx, not for {format}.')
    if opset not in OPSETS:
        raise UserError(f'--opset takes {OPSETS[0]} to {OPSETS[-1]}, not {opset}.')
    if opset < DYNAMO_OPSET and (quantize or dynamic):
        what = '--quantize int8' if quantize else 'A model for images of any size (--dynamic)'
        raise UserError(f'{what} needs --opset {DYNAMO_OPSET} or more, not {opset}.')


def _keep(file: Path, path: Path) -> int:
    """Move what was written to its place, the weights beside it first, and return its size in bytes."""
    size = file.stat().st_size
    weights = file.with_suffix('.bin')
    if weights.exists():
        size += weights.stat().st_size
        os.replace(weights, path.with_suffix('.bin'))
    os.replace(file, path)
    return size


def _write(write: Callable[..., Run], model: T2TViT, x: torch.Tensor, file: str, format: str) -> Run:
    try:
        return write(model, x, file)
    except UserError:
        raise
    except Exception as e:
        if torch.__version__ >= TESTED_TORCH:
            raise
        reason = str(e).strip().split('\n')[0] or type(e).__name__
        sizes = ' for images of any size' if model.dynamic_img_size else ''
        raise UserError(
            f'torch {torch.__version__} cannot export this model as {format}{sizes} ({reason}); '
            f'torch {TESTED_TORCH} can. Nothing was written.'
        ) from e


def _images(model: T2TViT) -> list[torch.Tensor]:
    # the first is the exporter's example: a batch of 1 would be taken for a constant
    sizes = [model.patch_embed.img_size] * 3
    if model.dynamic_img_size:
        height, width = (max(s, MIN_SIZE) for s in model.patch_embed.img_size)
        sizes = [(height, width)] * 3 + [(height + 45, width), (height, width + 32)]
    generator = torch.Generator().manual_seed(0)
    batches = (2, 1, 3, 1, 2)
    return [
        torch.randn(b, model.in_chans, h, w, generator=generator) for b, (h, w) in zip(batches, sizes, strict=False)]


def _compare(model: T2TViT, run: Run, images: list[torch.Tensor], format: str) -> float:
    max_diff = 0.
    for x in images:
        expected, got = model(x), run(x)
        if got.shape != expected.shape:
            raise UserError(
                f'The {format} model gives logits of shape {tuple(got.shape)} for images {tuple(x.shape)}, '
                f'not {tuple(expected.shape)}; nothing was written.'
            )
        diff = (got - expected).abs().max().item()
        if not diff <= TOLERANCE * max(1., expected.abs().max().item()):  # nan is not
            raise UserError(
                f'The {format} model differs from the model by {diff:.1e} in a logit for images {tuple(x.shape)}, '
                f'over the {TOLERANCE:.0e} allowed; nothing was written.'
            )
        max_diff = max(max_diff, diff)
    return max_diff


def _dynamic_shapes(model: T2TViT) -> dict[str, Any]:
    shapes = {0: torch.export.Dim('batch', max=MAX_BATCH)}
    if model.dynamic_img_size:
        shapes[2] = torch.export.Dim('height', min=MIN_SIZE, max=MAX_SIZE)
        shapes[3] = torch.export.Dim('width', min=MIN_SIZE, max=MAX_SIZE)
    return {'x': shapes}


def _exported_program(model: T2TViT, x: torch.Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(model, (x,), dynamic_shapes=_dynamic_shapes(model), strict=False)


def _save_onnx(model: T2TViT, x: torch.Tensor, file: str, opset: int = OPSET) -> None:
    for name in ('onnx_ir', 'onnxscript'):  # they tell of each constant
        logging.getLogger(name).setLevel(logging.WARNING)
    program = torch.onnx.export(
        _exported_program(model, x),
        (x,),
        dynamo=True,
        dynamic_shapes=_dynamic_shapes(model),  # names the sizes
        opset_version=opset,
        input_names=['x'],
        output_names=['logits'],
        verbose=False,
    )
    assert program is not None  # dynamo=True gives one
    program.save(file, external_data=False)


def _save_older_onnx(model: T2TViT, x: torch.Tensor, file: str, opset: int) -> None:
    names = {'x': {0: 'batch'}, 'logits': {0: 'batch'}}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # it is deprecated, and tells of each size that it takes for a constant
        torch.onnx.export(
            model, (x,), file, dynamo=False, opset_version=opset, input_names=['x'], output_names=['logits'],
            dynamic_axes=names)


def _check_packages(names: tuple[str, ...], what: str) -> None:
    missing = ' '.join(name for name in names if find_spec(name) is None)
    if missing:
        raise UserError(f'{what} needs more packages: pip install {missing}')


def _run_onnx(file: str) -> Run:
    import onnxruntime
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(['logits'], {'x': x.numpy()})[0])


def _write_onnx(model: T2TViT, x: torch.Tensor, file: str, opset: int = OPSET) -> Run:
    _check_packages(('onnx', 'onnxscript', 'onnxruntime'), 'The ONNX export')
    save = _save_onnx if opset >= DYNAMO_OPSET else _save_older_onnx
    save(model, x, file, opset)
    return _run_onnx(file)


def _quantize_onnx(file: str, calibration: Calibration) -> Run:
    target = f'{file}.int8'
    quantize_onnx(file, target)
    os.replace(target, file)
    return _run_onnx(file)


def _convert_to_openvino(onnx_file: str):
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


def _run_openvino(ov_model, file: str) -> Run:
    import openvino
    openvino.save_model(ov_model, file, compress_to_fp16=False)
    compiled = openvino.compile_model(file, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    return lambda x: torch.from_numpy(compiled([x.numpy()])[0].copy())


def _write_openvino(model: T2TViT, x: torch.Tensor, file: str) -> Run:
    _check_packages(('openvino', 'onnx', 'onnxscript'), 'The OpenVINO export')
    _save_onnx(model, x, f'{file}.onnx')
    return _run_openvino(_convert_to_openvino(f'{file}.onnx'), file)


def _quantize_openvino(file: str, calibration: Calibration) -> Run:
    onnx_file = f'{file}.onnx'
    return _run_openvino(quantize_openvino(_convert_to_openvino(onnx_file), onnx_file, calibration), file)


def _save(save: Callable[[io.BytesIO], Any], file: str) -> None:
    """Write what torch saves; it ends the process if it finds the disk full."""
    buffer = io.BytesIO()
    save(buffer)
    Path(file).write_bytes(buffer.getbuffer())


def _write_export(model: T2TViT, x: torch.Tensor, file: str) -> Run:
    _save(partial(torch.export.save, _exported_program(model, x)), file)
    return torch.export.load(file).module()


@contextmanager
def _temporary_folder() -> Iterator[str]:
    """Give a folder with the system's temporary files, where the compiler's are too, and tell if they have no room."""
    with TemporaryDirectory() as tmp:
        try:
            yield tmp
        except Exception as e:
            full = os.strerror(errno.ENOSPC) in str(e) or shutil.disk_usage(gettempdir()).free < 1 << 20
            if not full or getattr(e, 'filename', None):
                raise
            raise UserError(
                f'{gettempdir()} has no room left for the temporary files of AOTInductor: make room there, or name '
                'another folder in TMPDIR.') from e


def _write_aoti(model: T2TViT, x: torch.Tensor, file: str) -> Run:
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as e:
        raise UserError('AOTInductor needs a C++ compiler: install g++ or clang++, or name one in CXX.') from e
    with _temporary_folder() as tmp:
        package = aoti_compile_and_package(_exported_program(model, x), package_path=f'{tmp}/model.pt2')
        shutil.copyfile(package, file)
        return aoti_load_package(file)


def _write_torchscript(model: T2TViT, x: torch.Tensor, file: str) -> Run:
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '`torch.jit', FutureWarning)  # TorchScript is what was asked for
        _save(partial(torch.jit.save, torch.jit.script(model)), file)
        return torch.jit.load(file)


FORMATS: dict[str, tuple[Callable[..., Run], str]] = {
    'onnx': (_write_onnx, '.onnx'),
    'openvino': (_write_openvino, '.xml'),
    'export': (_write_export, '.pt2'),
    'aoti': (_write_aoti, '.pt2'),
    'torchscript': (_write_torchscript, '.pt'),
}

# A name with one of these ends does not contradict its format.
SUFFIXES = dict({name: (suffix,) for name, (_, suffix) in FORMATS.items()}, torchscript=('.pt', '.pth', '.ts'))

QUANTIZERS = {'onnx': _quantize_onnx, 'openvino': _quantize_openvino}
