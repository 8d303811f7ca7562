"""int8 models from exported ones, and how well they agree with the model on images."""
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.utils import tqdm

from ..errors import UserError
from ..models import T2TViT
from .images import find_images, image_reader

_logger = logging.getLogger(__name__)

__all__ = [
    'Agreement', 'Calibration', 'calibration_files', 'measure_agreement', 'quantize_onnx', 'quantize_openvino']

SUBSET = 300  # images that ranges of activations are taken from, spread evenly over the folder; NNCF's default

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


def calibration_files(folder: str | Path, warn: bool = False) -> list[str]:
    """Return the image files of a folder; what else lies there is named in a warning, if wanted.

    Raises:
        UserError: No such folder, or no images in it.
    """
    if not Path(folder).is_dir():
        raise UserError(f'There is no folder {folder} with images for --calibration.')
    files = find_images([str(folder)], warn)
    if not files:
        raise UserError(f'There are no images in {folder}: --calibration takes a folder with images.')
    return files


class Calibration:
    """Images of a folder, each read when it is needed, by the model's own preprocessing.

    Those that cannot be read are left out, with a warning.

    Args:
        folder: Folder with images, searched recursively.
        model: Model that reads them; its img_size is the size of the images.

    Raises:
        UserError: No such folder, no images in it that can be read, or a model without a classifier.
    """

    def __init__(self, folder: str | Path, model: T2TViT) -> None:
        if model.num_classes < 1:
            raise UserError('int8 models are compared by their classes, but this model has no classifier.')
        self._read = image_reader(model)
        self.files = [file for file in calibration_files(folder, warn=True) if self._is_readable(file)]
        if not self.files:
            raise UserError(f'None of the images in {folder} can be read.')

    def read(self, file: str) -> torch.Tensor:
        """Return an image, (1, C, H, W).

        Raises:
            UserError: The file cannot be read as an image.
        """
        try:
            return self._read(file)
        except ValueError as e:
            raise UserError(f'{file} cannot be read as an image: {e}') from e

    def _is_readable(self, file: str) -> bool:
        try:
            self.read(file)
        except UserError as e:
            _logger.warning(f'Left out: {e}')
            return False
        return True

    def subset(self) -> list[str]:
        """Return up to SUBSET files, spread evenly over all."""
        count = min(len(self.files), SUBSET)
        return [self.files[i * len(self.files) // count] for i in range(count)]


def measure_agreement(model: T2TViT, run: Run, calibration: Calibration) -> Agreement:
    """Compare the probabilities of an int8 model with those of the float model on all images.

    Raises:
        UserError: An image cannot be read, or the int8 model gives a logit that is not finite.
    """
    same, max_diff = 0, 0.
    for file in tqdm(calibration.files, unit='image', delay=1, disable=None):
        x = calibration.read(file)
        expected, got = model(x), run(x)
        if not got.isfinite().all():
            raise UserError(f'The int8 model gives logits that are not finite for {file}; nothing was written.')
        same += int((got.argmax(dim=1) == expected.argmax(dim=1)).sum())
        max_diff = max(max_diff, (got.softmax(dim=1) - expected.softmax(dim=1)).abs().max().item())
    return Agreement(len(calibration.files), same, max_diff)


def _performer_nodes(onnx_file: str) -> list[str]:
    """Return the names of the Performers' nodes: in int8 their exponentials lose what tells keys apart.

    Raises:
        UserError: The file does not say which module a node is of, as that of torch's exporter does.
    """
    import onnx
    modules = {
        node.name: ' '.join(p.value for p in node.metadata_props) for node in onnx.load(onnx_file).graph.node}
    if not any('patch_embed' in names for names in modules.values()):
        raise UserError(
            'The ONNX file does not say which module its nodes are of, so that the Performers cannot be left in '
            'float32: export the model with a newer torch.')
    return sorted(name for name, names in modules.items() if 'TokenPerformer' in names)


def quantize_onnx(onnx_file: str, target: str) -> None:
    """Write an ONNX file with int8 linear layers, the Performers' excepted.

    Ranges of activations are taken when the model runs: fixed ones, from images, kept less of the accuracy.
    """
    from onnxruntime.quantization import quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process
    kept = _performer_nodes(onnx_file)
    prepared = f'{target}.prepared'
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    root.setLevel(logging.ERROR)  # it advises quant_pre_process, which has just run, and leaves a handler behind
    try:
        quant_pre_process(onnx_file, prepared, skip_symbolic_shape=True)
        quantize_dynamic(
            prepared,
            target,
            op_types_to_quantize=['MatMul', 'Gemm'],
            nodes_to_exclude=kept,
            per_channel=True,
        )
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
        Path(prepared).unlink(missing_ok=True)


def quantize_openvino(ov_model, onnx_file: str, calibration: Calibration):
    """Return an OpenVINO model made from an ONNX file, quantized by NNCF, but for the Performers."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        import nncf
        logging.getLogger('nncf').setLevel(logging.ERROR)
        nodes = set(_performer_nodes(onnx_file))
        names = [
            op.get_friendly_name() for op in ov_model.get_ordered_ops()
            if op.get_friendly_name() in nodes and op.get_type_name() != 'Constant']
        return nncf.quantize(
            ov_model,
            nncf.Dataset(calibration.subset(), lambda file: calibration.read(file).numpy()),
            subset_size=SUBSET,
            ignored_scope=nncf.IgnoredScope(names=names),
        )
