"""int8 models from exported ones, and how well they agree with the model on images."""
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.utils import tqdm

from ..errors import UserError
from ..models import T2TViT
from .images import ImageReader

_logger = logging.getLogger(__name__)

__all__ = ['Agreement', 'Calibration', 'Run', 'measure_agreement', 'quantize_onnx', 'quantize_openvino', 'quiet']

SUBSET = 300  # images that ranges of activations are taken from, spread evenly over the folder; NNCF's default
PRODUCTS = ['MatMul', 'Gemm']
_BAR: dict[str, Any] = dict(unit='image', delay=1, disable=None)

Run = Callable[[torch.Tensor], torch.Tensor]


class Agreement(NamedTuple):
    """How an int8 model agrees with the float model on images."""
    images: int
    same: int  # images with the same most probable class
    max_diff: float  # largest difference of a probability

    def __str__(self) -> str:
        return (
            f'same class as the float model for {100 * self.same / self.images:.1f} % of {self.images} images; '
            f'largest difference in a probability {self.max_diff:.3f}')


class Calibration:
    """Images by the model's own preprocessing; each is decoded once.

    Up to SUBSET, spread evenly over the files, are read at once, and kept: `subset` has their names and pixels, (C, H,
    W) in uint8. The others are read when they are compared. Those that cannot be read are left out, with a warning.
    """

    def __init__(self, files: list[str], model: T2TViT) -> None:
        if model.num_classes < 1:
            raise UserError('int8 models are compared by their classes, but this model has no classifier.')
        self._reader = ImageReader(model)
        count = min(len(files), SUBSET)
        first = {files[i * len(files) // count]: None for i in range(count)}
        self._others = [file for file in files if file not in first]
        self.subset = [*self._read(tqdm(first, desc='Reading', **_BAR))]
        if not self.subset:
            raise UserError(f'None of the images in {Path(files[0]).parent} can be read.')

    def _read(self, files: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        for file in files:
            try:
                yield file, self._reader.pixels(file)
            except ValueError as e:
                _logger.warning(f'Left out: {file} cannot be read as an image: {e}')

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the model's input, (1, C, H, W), of an image."""
        return self._reader.normalize(pixels[None])

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        images, total = chain(self.subset, self._read(self._others)), len(self.subset) + len(self._others)
        for file, pixels in tqdm(images, desc='Comparing', total=total, **_BAR):
            yield file, self.normalize(pixels)


def measure_agreement(model: T2TViT, run: Run, calibration: Calibration) -> Agreement:
    """Compare the probabilities of an int8 model with those of the float model on all images."""
    images, same, max_diff = 0, 0, 0.
    for file, x in calibration:
        expected, got = model(x), run(x)
        if not got.isfinite().all():
            raise UserError(f'The int8 model gives logits that are not finite for {file}; nothing was written.')
        images += 1
        same += int((got.argmax(dim=1) == expected.argmax(dim=1)).sum())
        max_diff = max(max_diff, (got.softmax(dim=1) - expected.softmax(dim=1)).abs().max().item())
    return Agreement(images, same, max_diff)


def _performers(graph: Any) -> list:
    """Return the Performers' nodes of an ONNX graph: in int8 their exponentials lose what tells keys apart."""
    modules = [(node, ' '.join(p.value for p in node.metadata_props)) for node in graph.node]
    if not any('patch_embed' in names for _, names in modules):
        raise UserError(
            'The ONNX file does not say which module its nodes are of, so that the Performers cannot be left in '
            'float32: export the model with a newer torch.')
    return [node for node, names in modules if 'TokenPerformer' in names]


def _weight_shape(node: Any, graph: Any) -> tuple[int, ...]:
    shapes = [tuple(weight.dims) for weight in graph.initializer if weight.name in node.input]
    return max(shapes, key=len, default=())  # a bias has one axis


@contextmanager
def quiet() -> Iterator[None]:
    """Keep a library from warning, and from leaving its handler with the root logger."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def quantize_onnx(onnx_file: Path, target: Path) -> None:
    """Write an ONNX file with int8 linear layers, the Performers' excepted.

    Ranges of activations are taken when the model runs: fixed ones, from images, kept less of the accuracy.
    """
    import onnx
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process
    graph = onnx.load(onnx_file).graph
    # onnxruntime has no int8 products with weights of more than two axes
    nodes = _performers(graph) + [n for n in graph.node if n.op_type == 'MatMul' and len(_weight_shape(n, graph)) > 2]
    names = [f'{node.name}{end}' for node in nodes for end in ('', '_MatMul')]  # a Gemm's, when it is taken apart
    prepared = target.with_name(f'{target.name}.prepared')
    with quiet():  # it advises quant_pre_process, which has just run
        quant_pre_process(onnx_file, prepared, skip_symbolic_shape=True)
        quantize_dynamic(prepared, target, op_types_to_quantize=PRODUCTS, nodes_to_exclude=names, per_channel=True)
    prepared.unlink()


def quantize_openvino(ov_model, onnx_file: Path, calibration: Calibration):
    """Return an OpenVINO model made from an ONNX file, quantized by NNCF.

    Sums stay in float32: the tokens, to which each block adds, lose most by int8. So do the Performers, but for what
    makes their keys, queries and values: a convolution, or the first products.
    """
    with quiet():
        import nncf
        import onnx
        logging.getLogger('nncf').setLevel(logging.ERROR)
        graph = onnx.load(onnx_file).graph
        nodes = [node for node in _performers(graph) if node.op_type != 'Conv']
        shapes = {node.name: _weight_shape(node, graph) for node in nodes if node.op_type in PRODUCTS}
        first = next(iter(shapes.values()), None)
        left = {node.name for node in nodes if shapes.get(node.name) != first}
        names = [
            op.get_friendly_name() for op in ov_model.get_ordered_ops()
            if op.get_friendly_name().split('/')[0] in left and op.get_type_name() not in ('Constant', 'Add')]
        return nncf.quantize(
            ov_model,
            nncf.Dataset(calibration.subset, lambda image: calibration.normalize(image[1]).numpy()),
            subset_size=SUBSET,
            ignored_scope=nncf.IgnoredScope(names=names, types=['Add'], validate=False),
        )
