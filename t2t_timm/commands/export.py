"""Export of a model to a file of one of the formats, which is compared with the model before it is kept."""
import logging
import math
import os
from copy import deepcopy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import UserError, suggestion
from ..files import check_new_folder, check_target, folder_beside
from ..models import T2TViT
from .formats import DYNAMO_OPSET, FORMATS, MIN_SIZE, OPSET, Source
from .images import find_images
from .quantize import Agreement, Calibration, Run, measure_agreement

__all__ = ['OPSETS', 'Export', 'Exported', 'export_model']

OPSETS = range(16, 25)
TESTED_TORCH = '2.14'  # every format and --dynamic; the exporters of older releases do less
TOLERANCE = 1e-4  # largest difference of logits, relative where they are above 1
HALF_TOLERANCE = 2e-2  # of a file in float16, whose numbers have 11 bits

_logger = logging.getLogger(__name__)


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
        dtype: str | None = None,
) -> Exported:
    """Export a model through the framework's own exporter, compare the result with the model, and write the file.

    The batch size stays free; so does the image size, from 32 pixels up, of a model made with dynamic_img_size=True
    (TorchScript takes what the model takes). ExecuTorch's file is for one image at a time.

    Args:
        model: Model to export; a copy of it is exported for evaluation, on the CPU.
        path: File to write; it appears, or is replaced, only if the comparison succeeds. OpenVINO writes NAME.xml and
            NAME.bin, transformers.js a new folder.
        format: 'onnx', 'openvino', 'export' (torch.export), 'aoti' (an AOTInductor package for this kind of machine),
            'torchscript', 'executorch' (for XNNPACK) or 'transformers.js'.
        quantize: 'int8' (ONNX, OpenVINO and transformers.js) or None. The float32 model is compared first.
        calibration: Folder with images for quantize, which the int8 model is compared on. OpenVINO's takes the ranges
            of its activations from them, ONNX's takes them when it runs.
        opset: Opset of the format 'onnx', 16 to 24, by default 20. 16 and 17 are for one image size, without quantize.
        dtype: 'float16' for an ONNX file that computes in float16, from float32 to float32, or an OpenVINO file with
            weights in float16; None or 'float32' for float32.

    Returns:
        The file, its size in bytes (with NAME.bin), the largest difference in a logit before int8, the shapes of the
        images compared, and the agreement of the int8 model.

    Raises:
        UserError: An unknown format, arguments that do not go together, a missing package or compiler, an exporter
            that is too old for this, no folder to write to, no images to calibrate with, or too large a difference.
    """
    return Export(Path(path), format, quantize, calibration, opset, dtype, model.dynamic_img_size).run(model)


@dataclass
class Export:
    """Arguments of `export_model`, validated before a model is loaded."""
    path: Path
    format: str = 'onnx'
    quantize: str | None = None
    calibration: str | Path | None = None
    opset: int | None = None
    dtype: str | None = None
    dynamic: bool = False  # the model is made with dynamic_img_size=True

    def __post_init__(self) -> None:
        self.half, name = self.dtype == 'float16', self.format
        if name not in FORMATS:
            raise UserError(f'Unknown format {name!r}: use one of {", ".join(FORMATS)}.{suggestion(name, FORMATS)}')
        kind = self.kind = FORMATS[name]
        if self.quantize not in (None, 'int8'):
            raise UserError(f'Unknown quantization {self.quantize!r}: use int8.')
        if self.dtype not in (None, 'float32', 'float16'):
            raise UserError(f'Unknown dtype {self.dtype!r}: use float32 or float16.')
        given = {'--opset': self.opset is not None, '--quantize int8': self.quantize, '--dtype float16': self.half}
        for option, is_given in given.items():
            if is_given and option not in kind.options:
                formats = ', '.join(name for name, kind in FORMATS.items() if option in kind.options)
                raise UserError(f'{option} is for {formats}, not for {name}.')
        first = DYNAMO_OPSET if self.quantize or self.half or self.dynamic else OPSETS[0]
        if self.opset is not None and not first <= self.opset <= OPSETS[-1]:
            raise UserError(
                f'--opset takes {OPSETS[0]} to {OPSETS[-1]}, for int8, float16 and images of any size {DYNAMO_OPSET} '
                f'to {OPSETS[-1]}, not {self.opset}.')
        if self.half and self.quantize:
            raise UserError('--quantize int8 and --dtype float16 make two different files: use one of them.')
        if self.dynamic and kind.is_fixed:
            raise UserError(f'A file of {name} is for one image size: leave out --dynamic.')
        if self.calibration is not None and not self.quantize:
            raise UserError('--calibration is for --quantize int8.')
        if kind.suffixes:
            check_target(self.path, *kind.suffixes)
        else:
            check_new_folder(self.path)
        if name == 'openvino':
            weights = self.path.with_suffix('.bin')
            if self.path.suffix != '.xml':
                raise UserError(f'OpenVINO reads NAME.xml and NAME.bin: name a file .xml, not {self.path.name}.')
            if weights.is_dir() or weights.exists() and not self.path.exists():
                raise UserError(f'{weights} exists and is not the weights of {self.path.name}: use another name.')
        is_folder = self.calibration is not None and Path(self.calibration).is_dir()
        self.files = find_images([str(self.calibration)]) if is_folder else []
        if self.quantize and not self.files:
            other = '' if self.calibration is None else f', not {self.calibration}'
            raise UserError(f'--quantize int8 needs --calibration FOLDER, a folder with images{other}.')
        missing = [p for p in kind.packages + kind.quantize_packages * bool(self.quantize) if find_spec(p) is None]
        if missing:
            raise UserError(f'The format {name} needs more packages: pip install {" ".join(missing)}')

    @torch.inference_mode(False)
    @torch.no_grad()
    def run(self, model: T2TViT) -> Exported:
        """Export a model, as `export_model` does."""
        path, kind, format = self.path, self.kind, self.format
        model = deepcopy(model).cpu().float().eval()  # whose weights are not those of torch.inference_mode
        images = _images(model, kind.is_fixed)
        data = Calibration(self.files, model) if self.files else None
        with folder_beside(path) as tmp:
            file = tmp / f'model{"".join(kind.suffixes[:1])}'
            source = Source(model, images[0], tmp, self.opset or OPSET, self.half)
            _logger.info(f'Exporting, format {format} ...')
            try:
                kind.write(source, file)
            except UserError:
                raise
            except Exception as e:
                if torch.__version__ >= TESTED_TORCH:
                    raise
                reason = str(e).strip().split('\n')[0] or type(e).__name__
                sizes = ' for images of any size' if self.dynamic else ''
                raise UserError(
                    f'torch {torch.__version__} cannot export this model as {format}{sizes} ({reason}); '
                    f'torch {TESTED_TORCH} can. Nothing was written.') from e
            _logger.info('Comparing it with the model ...')
            max_diff = _compare(model, kind.run(file), images, format, HALF_TOLERANCE if self.half else TOLERANCE)
            agreement = None
            if data is not None and kind.quantize is not None:
                _logger.info('Quantizing it to int8 ...')
                kind.quantize(source, file, data)
                _logger.info('Comparing it with the model on the images ...')
                agreement = measure_agreement(model, kind.run(file), data)
            size = _keep(file, path)  # no session has it open any more, which Windows would not rename
        return Exported(path, size, max_diff, [tuple(x.shape) for x in images], agreement)


def _keep(file: Path, path: Path) -> int:
    """Move what was written to its place, the weights beside it first, and return its size in bytes."""
    weights = file.with_suffix('.bin')
    parts = [p for p in (file, weights, *file.rglob('*')) if p.is_file()]
    size = sum(p.stat().st_size for p in parts)
    if weights.exists():
        os.replace(weights, path.with_suffix('.bin'))
    if file.is_dir() and path.is_dir():
        path.rmdir()  # it is empty
    os.replace(file, path)
    return size


def _images(model: T2TViT, fixed: bool) -> list[torch.Tensor]:
    # the first is the exporter's example: a batch of 1 would be taken for a constant
    batches = [1, 1] if fixed else [2, 1, 3]
    height, width = model.patch_embed.img_size
    if model.dynamic_img_size:
        height, width = max(height, MIN_SIZE), max(width, MIN_SIZE)
    shapes = [(b, height, width) for b in batches]
    if model.dynamic_img_size:
        shapes += [(1, height + 45, width), (2, height, width + 32)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(b, model.in_chans, h, w, generator=generator) for b, h, w in shapes]


def _compare(model: T2TViT, run: Run, images: list[torch.Tensor], format: str, tolerance: float) -> float:
    max_diff = 0.
    for x in images:
        expected, got = model(x), run(x)
        diff = (got - expected).abs().max().item() if got.shape == expected.shape else math.inf
        if not diff <= tolerance * max(1., expected.abs().max().item()):  # nan is not
            raise UserError(
                f'The {format} model differs from the model by {diff:.1e} in a logit for images {tuple(x.shape)}, '
                f'over the {tolerance:.0e} allowed; nothing was written.')
        max_diff = max(max_diff, diff)
    return max_diff
