"""Export to ONNX, torch.export, AOTInductor and TorchScript, each compared with the model before it is kept."""
import logging
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import UserError
from ..files import new_file
from ..models import T2TViT

__all__ = ['FORMATS', 'OPSET', 'Exported', 'export_model']

OPSET = 20
TESTED_TORCH = '2.14'  # every format and --dynamic; the exporters of older releases do less
TOLERANCE = 1e-4  # of the logits, relative where they are above 1
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

    def __str__(self) -> str:
        shapes = ', '.join('x'.join(map(str, shape)) for shape in self.shapes)
        return f'{self.path}: {self.size / 1e6:.1f} MB; largest difference in a logit {self.max_diff:.1e} over {shapes}'


def export_model(model: T2TViT, path: str | Path, format: str = 'onnx') -> Exported:
    """Export a model through the framework's own exporter, compare the result with the model, and write the file.

    The batch size stays free; so does the image size, from 32 pixels up, of a model made with dynamic_img_size=True
    (TorchScript takes what the model takes).

    Args:
        model: Model to export; it is exported in float32, for evaluation, on the CPU.
        path: File to write; it appears, or is replaced, only if the comparison succeeds.
        format: 'onnx', 'export' (torch.export), 'aoti' (an AOTInductor package for this kind of machine) or
            'torchscript'.

    Returns:
        The file, its size in bytes, the largest difference in a logit, and the shapes of the images compared.

    Raises:
        UserError: An unknown format, a missing package or compiler, an exporter that is too old for this, no folder to
            write to, or too large a difference.
    """
    if format not in FORMATS:
        raise UserError(f"Unknown format {format!r}: use one of {', '.join(FORMATS)}.")
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(f'There is no folder {path.parent} to write {path.name} to.')
    if path.is_dir():
        raise UserError(f'{path} is a folder: name a file to write.')
    write, suffix = FORMATS[format]
    model = model.float().eval()
    images = _images(model)
    _logger.info(f'Exporting to {format} ...')
    with new_file(path, suffix) as file, torch.inference_mode(False), torch.no_grad():
        run = _write(write, model, images[0], str(file), format)
        _logger.info('Comparing it with the model ...')
        max_diff = _compare(model, run, images, format)
        del run  # Windows renames no file that is open, as what reads this one may have it
    return Exported(path, path.stat().st_size, max_diff, [tuple(x.shape) for x in images])


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
    sizes = [model.img_size] * 3
    if model.dynamic_img_size:
        height, width = (max(s, MIN_SIZE) for s in model.img_size)
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


def _write_onnx(model: T2TViT, x: torch.Tensor, file: str) -> Run:
    missing = [name for name in ('onnx', 'onnxscript', 'onnxruntime') if find_spec(name) is None]
    if missing:
        raise UserError(f"The ONNX export needs {' and '.join(missing)}: pip install t2t-timm[onnx]")
    import onnxruntime
    for name in ('onnx_ir', 'onnxscript'):  # they tell of each constant
        logging.getLogger(name).setLevel(logging.WARNING)
    program = torch.onnx.export(
        model,
        (x,),
        dynamo=True,
        dynamic_shapes=_dynamic_shapes(model),
        opset_version=OPSET,
        input_names=['x'],
        output_names=['logits'],
        verbose=False,
    )
    assert program is not None  # as dynamo=True gives one
    program.save(file, external_data=False)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    return lambda x: torch.from_numpy(session.run(['logits'], {'x': x.numpy()})[0])


def _write_export(model: T2TViT, x: torch.Tensor, file: str) -> Run:
    torch.export.save(_exported_program(model, x), file)
    return torch.export.load(file).module()


def _write_aoti(model: T2TViT, x: torch.Tensor, file: str) -> Run:
    from torch._inductor import aoti_compile_and_package, aoti_load_package
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as e:
        raise UserError('AOTInductor needs a C++ compiler: install g++ or clang++, or name one in CXX.') from e
    aoti_compile_and_package(_exported_program(model, x), package_path=file)
    return aoti_load_package(file)


def _write_torchscript(model: T2TViT, x: torch.Tensor, file: str) -> Run:
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', '`torch.jit', FutureWarning)  # TorchScript is what was asked for
        torch.jit.script(model).save(file)
        return torch.jit.load(file)


FORMATS = {
    'onnx': (_write_onnx, '.onnx'),
    'export': (_write_export, '.pt2'),
    'aoti': (_write_aoti, '.pt2'),
    'torchscript': (_write_torchscript, '.pt'),
}
