"""Paddle's .pdparams files: read without Paddle and without running what a pickle asks for, then made torch's.

The unpickler never hands out numpy's or any other real class. What a file calls numpy's is a stand-in here, which takes
the bytes, the type and the shape of an array and checks them.
"""
import os
import pickle
import re
from collections.abc import Callable
from math import prod
from typing import Any, BinaryIO, Literal

import numpy as np
import torch

from ..errors import UserError
from .pickles import GuardedUnpickler

__all__ = ['as_tensor', 'is_transposed', 'load_paddle']

PARAMETER_NAMES = 'StructuredToParameterName@@'  # paddle.save adds the parameters' other names under this key

_DTYPES = ('b1', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'f2', 'f4', 'f8')


class _DType:
    """Stands for numpy.dtype: one of the plain number types."""

    def __init__(self, code: Any, *args: Any) -> None:
        if code not in _DTYPES:
            raise pickle.UnpicklingError(f'an array of type {code!r}, not of numbers')
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ('<', '>', '|', '='):
            raise pickle.UnpicklingError(f'a byte order {state[1]!r}')
        self.code = state[1] + self.code


class _Array:
    """Stands for numpy.ndarray while its pickle is read; `value` is the array."""
    value: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        self.value = _make_array(data, dtype, shape, 'F' if is_fortran else 'C')


def _make_array(data: Any, dtype: Any, shape: Any, order: Literal['C', 'F'] = 'C') -> np.ndarray:
    if not isinstance(dtype, _DType) or not isinstance(data, (bytes, bytearray)):
        raise pickle.UnpicklingError('an array without bytes or type')
    flat = np.frombuffer(data, np.dtype(dtype.code))
    if not all(isinstance(n, int) and n >= 0 for n in shape) or prod(shape) != flat.size:
        raise pickle.UnpicklingError(f'an array of shape {shape} with {flat.size} values')
    return flat.reshape(shape, order=order)


class _Unpickler(GuardedUnpickler):
    """Admits numpy arrays and the containers that paddle.save puts them in."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        module = re.sub(r'^numpy\._core\b', 'numpy.core', module).replace('__builtin__', 'builtins')
        try:
            # bound methods, which a pickle cannot change
            return getattr(self, _ADMITTED[module, name])
        except KeyError:
            raise pickle.UnpicklingError(f'{module}.{name}, which is not a numpy array') from None

    def _ndarray(self, *args: Any) -> None:
        raise pickle.UnpicklingError('a numpy.ndarray made by hand')

    def _reconstruct(self, *args: Any) -> _Array:
        return _Array()

    def _dtype(self, code: Any, *args: Any) -> _DType:
        return _DType(code)

    def _scalar(self, dtype: Any, data: Any) -> Any:
        return _make_array(data, dtype, ())[()]

    def _frombuffer(self, data: Any, dtype: Any, shape: Any, order: str) -> np.ndarray:
        return _make_array(data, dtype, shape, 'F' if order == 'F' else 'C')

    def _encode(self, text: str, encoding: str) -> bytes:
        self.spend(text)
        return text.encode('latin1')  # how pickle protocol 2 writes bytes

    def _bytes(self) -> bytes:
        return b''  # it writes empty bytes so

    def _tuple(self, items: Any = ()) -> tuple:
        self.spend(items)
        return tuple(items)

    def _ordered_dict(self, items: Any = ()) -> dict:
        self.spend(items)
        return dict(items)


_ADMITTED = {
    ('numpy', 'ndarray'): '_ndarray',
    ('numpy', 'dtype'): '_dtype',
    ('numpy.core.multiarray', '_reconstruct'): '_reconstruct',
    ('numpy.core.multiarray', 'scalar'): '_scalar',
    ('numpy.core.numeric', '_frombuffer'): '_frombuffer',
    ('_codecs', 'encode'): '_encode',
    ('builtins', 'bytes'): '_bytes',
    ('builtins', 'tuple'): '_tuple',
    ('collections', 'OrderedDict'): '_ordered_dict',
}


def _plain(value: Any, done: dict[int, Any]) -> Any:
    # Put arrays in the place of their stand-ins. A tensor inside another dict is saved as (name, array).
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        return _plain(value[1], done)
    if not isinstance(value, dict):
        return value
    if id(value) not in done:  # a dict may hold another twice, which holds a third twice, and so on
        result = done[id(value)] = {}
        result.update({k: _plain(v, done) for k, v in value.items() if k != PARAMETER_NAMES})
    return done[id(value)]


def load_paddle(file: BinaryIO) -> dict[str, Any]:
    """Read, from a binary file, what paddle.save or pickle.dump wrote of a dict of arrays, nested dicts kept.

    Raises:
        UserError: The file holds something else than numpy arrays, or it is damaged.
    """
    name = getattr(file, 'name', 'The file')
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        loaded = _plain(_Unpickler(file, size).load(), {})
    except Exception as e:  # a damaged pickle can raise nearly anything
        reason = str(e) or type(e).__name__
        raise UserError(
            f'{name} is not a Paddle parameter file: {reason}. Only numpy arrays are read from a pickle.') from e
    if not isinstance(loaded, dict):
        raise UserError(f'{name} is not a Paddle parameter file: it holds a {type(loaded).__name__}, not a dict.')
    return loaded


def is_transposed(state_dict: dict[str, torch.Tensor]) -> bool:
    """Return whether linear weights stand as (in, out), as in Paddle's safetensors: their biases say it."""
    for name, weight in state_dict.items():
        bias = state_dict.get(re.sub(r'\.weight$', '.bias', name))
        if weight.ndim == 2 and bias is not None and weight.shape[0] != bias.numel():
            return weight.shape[1] == bias.numel()
    return False


def as_tensor(value: Any) -> torch.Tensor | None:
    """Return a tensor or array as a tensor, None for all else."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.astype(value.dtype.newbyteorder('=')))
    return value if isinstance(value, torch.Tensor) else None
