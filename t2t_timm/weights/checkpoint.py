"""Checkpoint files of every published format: recognised by their bytes, read without running a pickle.

This is the way in for a file: its bytes become the weights under the models' names (names.py, paddle.py) and the record
of what the model was (record.py).
"""
import argparse
import io
import os
import re
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO, NamedTuple
from zipfile import ZIP_STORED, ZipFile

import safetensors.torch
import torch
from safetensors import SafetensorError

from ..errors import UserError
from .fit import first_layer
from .names import abbreviate, find_weights, first_names
from .paddle import as_tensor, is_transposed, load_paddle
from .pickles import Inert, dry_run
from .record import Record, record_of

__all__ = ['Checkpoint', 'load_file', 'read_checkpoint']

_TORCH_LEGACY = b'\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.'  # the magic number that torch.save wrote before 1.6

_ONE_AT_A_TIME = Lock()  # torch's safe globals are those of all threads
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Checkpoint(NamedTuple):
    """What a file holds."""
    state_dict: dict[str, torch.Tensor]  # under the names of the models
    format: str  # in words
    notes: list[str]  # what was chosen and what was left out
    record: Record  # what the model was and what it was fed, as far as the file and the config.json beside it say


# Checkpoints hold these beside tensors: numpy's numbers, the statistics of mmengine's runner, and fastai's lists. torch
# finds them by their names.
_READ_PAST = [type(name, (Inert,), {'__module__': module}) for module, name in (
    ('numpy._core.multiarray', '_reconstruct'), ('numpy.core.multiarray', '_reconstruct'),
    ('numpy._core.multiarray', 'scalar'), ('numpy.core.multiarray', 'scalar'),
    ('numpy', 'ndarray'), ('numpy', 'dtype'), ('_codecs', 'encode'),  # the last in older protocols
    ('mmengine.logging.history_buffer', 'HistoryBuffer'), ('builtins', 'getattr'), ('fastcore.foundation', 'L'),
)]


def _check_torch(file: BinaryIO) -> None:
    # torch unpacks what it finds, whatever its size, and trusts the pickle's copies.
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if file.read(2) != b'PK':
        file.seek(0)
        return dry_run(file, size, 5)  # magic number, protocol, kinds of integers, what was saved, list of storages
    with ZipFile(file) as members:
        for info in members.infolist():
            if info.compress_type != ZIP_STORED or info.file_size > size:
                raise ValueError(f'its part {info.filename!r} is compressed, which torch.save does not do')
            if info.filename.endswith('/data.pkl'):
                dry_run(io.BytesIO(members.read(info)), size, 1)


def _load_torch(file: BinaryIO) -> Any:
    try:
        _check_torch(file)
        file.seek(0)
        with _ONE_AT_A_TIME, torch.serialization.safe_globals([argparse.Namespace, *_READ_PAST]):
            return torch.load(file, map_location='cpu', weights_only=True)
    except Exception as e:  # torch raises nearly anything for a damaged file
        found = re.search(r'Unsupported global: GLOBAL (\S+)|unsupported GLOBAL (\S+)', str(e))
        if found:
            raise UserError(
                f'{file.name} asks for {found[1] or found[2]}, which is not needed for weights and could run code, '
                'so nothing was loaded. If you trust the file, load it where it was made and save only its '
                'state_dict.'
            ) from e
        if 'Unsupported operand' in str(e):
            raise UserError(
                f"{file.name} was saved with a pickle_protocol above 3, which torch's safe loader cannot read: save it "
                'again where it was made, with torch.save(state_dict, FILE), without that argument.') from e
        reason = str(e).strip().split('\n')[0] or type(e).__name__
        raise UserError(f'{file.name} is not a readable PyTorch checkpoint, or it is cut short: {reason}') from e


def load_file(path: Path) -> tuple[Any, str]:
    """Return what a checkpoint file holds, and its format in words; a UserError says why it cannot be read safely."""
    with open(path, 'rb') as f:
        start = f.read(32)
        # It goes before pickles, as the length that it begins with may look like one.
        if start[8:9] == b'{' and int.from_bytes(start[:8], 'little') < path.stat().st_size:
            try:
                return safetensors.torch.load_file(path), 'safetensors'
            except SafetensorError as e:
                raise UserError(f'{path} is not a readable safetensors file, or it is cut short: {e}') from e
        if start.startswith(b'PK\x03\x04'):
            return _load_torch(f), 'PyTorch checkpoint'
        if start.startswith(_TORCH_LEGACY):
            return _load_torch(f), 'PyTorch checkpoint, written before 1.6'
        if start[:1] == b'\x80':
            return load_paddle(f), 'Paddle parameters'
    what = 'is empty' if not start else f'begins with {start[:8]!r}'
    raise UserError(
        f'{path} {what}: it is not a checkpoint of a known format (PyTorch .pth or .pth.tar, OpenMMLab .pth, Paddle '
        '.pdparams, safetensors).'
    )


def _checked_tensors(weights: dict[Any, Any], fmt: str, path: Path) -> dict[str, torch.Tensor]:
    state_dict, size, said = {}, path.stat().st_size, 0
    for name, value in weights.items():
        tensor = as_tensor(value)
        if tensor is None or not isinstance(name, str):
            continue
        if tensor.dtype == torch.uint16 and not fmt.startswith('PyTorch'):
            tensor = tensor.view(torch.bfloat16)  # Paddle writes it so
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta or tensor.dtype not in _DTYPES:
            raise UserError(f'{path} holds {name!r}, which is not a plain tensor of floating-point numbers.')
        said += tensor.numel() * tensor.element_size()
        if said > size:  # a tensor can be one number, repeated by its strides, and an array can have many names
            raise UserError(f'{path} is damaged: its tensors should have {said} bytes or more, the file has {size}.')
        state_dict[name] = tensor
    damaged = [k for k, v in state_dict.items() if not v.float().isfinite().all()]
    if damaged:
        raise UserError(f'{path} is damaged: it has values that are not finite in float32, in {abbreviate(damaged)}.')
    return state_dict


def read_checkpoint(path: str | Path, key: str | None = None) -> Checkpoint:
    """Read a checkpoint of any published format: PyTorch's, Paddle's or safetensors, whatever its name.

    Pickles are read with weights_only=True or, Paddle's, by an unpickler that admits numpy arrays only.

    Args:
        path: File to read.
        key: Model to take if the file holds several, as 'teacher' or 'state_dict.backbone'.

    Raises:
        UserError: Unknown format, a damaged file, a pickle that asks for more than weights, no T2T-ViT, or several and
            nothing that says which to take.
    """
    path = Path(path)
    loaded, fmt = load_file(path)
    if not isinstance(loaded, dict):
        raise UserError(f'{path} holds a {type(loaded).__name__}, not a state dict.')
    try:
        weights, notes = find_weights(loaded, key)
    except ValueError as e:
        raise UserError(f'{path}: {e}') from e
    if first_layer(weights) is None:
        raise UserError(f'{path} holds no T2T-ViT: its names begin with {first_names(loaded)}.')
    state_dict = _checked_tensors(weights, fmt, path)
    if fmt.startswith('Paddle') or is_transposed(state_dict):
        # The Performer's random features are the only matrix that is not the weight of a layer.
        state_dict = {k: v.t() if v.ndim == 2 and k.endswith('.weight') else v for k, v in state_dict.items()}
        notes.append('linear weights transposed, as Paddle keeps them')
    elif 'arch' in loaded and 'epoch' in loaded:
        fmt += ' of a timm training run'
    try:
        record = record_of(loaded, path.parent)
    except UserError as e:
        raise UserError(f'{path}: {e}') from e
    except Exception as e:  # a file's own words may be of any kind
        raise UserError(f'{path} says what it is in a way that cannot be read: {type(e).__name__}: {e}') from e
    return Checkpoint(state_dict, fmt, notes + record.told(), record)
