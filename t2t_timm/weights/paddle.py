"""Paddle's .pdparams files: read without Paddle and without running what a pickle asks for, then made torch's.

The unpickler never hands out numpy's or any other real class. What a file calls numpy's is a stand-in here, which takes
the bytes, the type and the shape of an array and checks them.
"""
import os
import pickle
import re
from math import prod
from typing import Any, BinaryIO, Literal

import numpy as np
import torch

from ..errors import UserError
from .pickles import GuardedUnpickler

__all__ = ['as_tensor', 'is_transposed', 'load_paddle']

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
    """Stands for numpy.ndarray; `value` is the array, once it is known."""
    value: np.ndarray

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, data = state
        self.value = _make_array(data, dtype, shape, 'F' if is_fortran else 'C')

    @property
    def ndim(self) -> int:
        return self.value.ndim


def _make_array(data: Any, dtype: Any, shape: Any, order: Literal['C', 'F'] = 'C') -> np.ndarray:
    if not isinstance(dtype, _DType) or not isinstance(data, (bytes, bytearray)):
        raise pickle.UnpicklingError('an array without bytes or type')
    flat = np.frombuffer(data, np.dtype(dtype.code))
    if not all(isinstance(n, int) and n >= 0 for n in shape) or prod(shape) != flat.size:
        raise pickle.UnpicklingError(f'an array of shape {shape} with {flat.size} values')
    return flat.reshape(shape, order=order)


class _Unpickler(GuardedUnpickler):
    """Admits numpy arrays and the containers that paddle.save puts them in."""

    def find_class(self, module: str, name: str) -> Any:
        module = re.sub(r'^numpy\._core\b', 'numpy.core', module).replace('__builtin__', 'builtins')
        admitted = {  # a pickle can set attributes of functions, but not of bound methods, nor of these two classes
            ('numpy', 'ndarray'): _Array,
            ('numpy', 'dtype'): _DType,
            ('numpy.core.multiarray', '_reconstruct'): _Array,
            ('numpy.core.multiarray', 'scalar'): self._scalar,
            ('numpy.core.numeric', '_frombuffer'): self._frombuffer,
            ('_codecs', 'encode'): self._encode,
            ('builtins', 'bytes'): self._bytes,
            ('builtins', 'tuple'): self._tuple,
            ('collections', 'OrderedDict'): self._ordered_dict,
        }
        if (module, name) not in admitted:
            raise pickle.UnpicklingError(f'{module}.{name}, which is not a numpy array')
        return admitted[module, name]

    def _scalar(self, dtype: Any, data: Any) -> Any:
        return _make_array(data, dtype, ())[()]

    def _frombuffer(self, data: Any, dtype: Any, shape: Any, order: str) -> _Array:
        array = _Array()
        array.__setstate__((1, shape, dtype, order == 'F', data))
        return array

    def _encode(self, text: str, encoding: str) -> bytes:
        self.spend(text)
        return text.encode('latin1')  # how pickle protocol 2 writes bytes

    def _bytes(self) -> bytes:
        return b''  # it writes empty bytes so

    def _tuple(self, items: Any = ()) -> Any:
        self.spend(items)
        items = tuple(items)  # paddle.save writes a tensor inside another dict so: (name, array)
        return items[1] if len(items) == 2 and isinstance(items[0], str) else items

    def _ordered_dict(self, items: Any = ()) -> dict:
        self.spend(items)
        return dict(items)


def load_paddle(file: BinaryIO) -> Any:
    """Read what paddle.save or pickle.dump wrote into a file of arrays, which as_tensor takes, and dicts of them.

    A UserError says if there is something else in it, or it is damaged.
    """
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        return _Unpickler(file, size).load()
    except Exception as e:  # a damaged pickle can raise nearly anything
        raise UserError(
            f'{file.name} is not a Paddle parameter file: {str(e) or type(e).__name__}. Only numpy arrays are read '
            'from a pickle.') from e


def is_transposed(state_dict: dict[str, torch.Tensor]) -> bool:
    """Return whether linear weights stand as (in, out), as in Paddle's safetensors: their biases say it."""
    for name, weight in state_dict.items():
        bias = state_dict.get(re.sub(r'\.weight$', '.bias', name))
        if weight.ndim == 2 and bias is not None and weight.shape[0] != bias.numel():
            return weight.shape[1] == bias.numel()
    return False


def as_tensor(value: Any) -> torch.Tensor | None:
    """Return a tensor, or an array of load_paddle, as a tensor; None for all else."""
    if isinstance(value, _Array):
        return torch.from_numpy(value.value.astype(value.value.dtype.newbyteorder('=')))
    return value if isinstance(value, torch.Tensor) else None
