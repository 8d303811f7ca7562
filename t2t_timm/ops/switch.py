"""The switch of all fused operations: a default of the process, and what a `with` block holds in its own context."""
from contextvars import ContextVar
from threading import Lock
from typing import Any
from weakref import ref

import torch

from _t2t_timm_autoload import is_off

_lock = Lock()
_here: ContextVar[tuple[bool, ...]] = ContextVar('set_fused', default=())  # what this context has entered
_entered: list['set_fused'] = []  # the same of all contexts
# The calls that set the default, the last one of which counts. A call may still become a context manager, which sets no
# default, as long as somebody has what it gave; the first one here cannot.
_calls: list[Any] = [(lambda: None, not is_off('T2T_TIMM_FUSED'))]
_default = _anywhere = _calls[0][1]
_COMPILES_CONTEXTS = torch.__version__ >= '2.14'  # older compilers cannot read a context variable


class set_fused:
    """Turn the fused operations of every T2T-ViT on or off, from the next call on.

    Called, it sets the default of the process. As a context manager, it holds inside the `with` block alone: in its
    thread or asyncio task, not in others, nor in threads that are started there (DataParallel's, and autograd's on a
    GPU, which compute gradient checkpoints again). Before torch 2.14, compiled models of all threads follow it.

    Off, each layer runs its equations module by module, and the last block computes every token.
    T2T_TIMM_FUSED=0 starts with them off. A scripted model runs the equations either way; a compiled one is compiled
    again.

    Args:
        enable: Whether fused operations may be used.
    """

    def __init__(self, enable: bool = True) -> None:
        self.enable = enable
        with _lock:
            _calls.append((ref(self), enable))
            _settle()

    def __enter__(self) -> None:
        with _lock:
            _calls[:] = [call for call in _calls if call[0]() is not self]
            _entered.append(self)
            _settle()
        _here.set((*_here.get(), self.enable))

    def __exit__(self, *exc: object) -> None:
        _here.set(_here.get()[:-1])
        with _lock:
            _entered.remove(self)
            _settle()


def _settle() -> None:
    global _default, _anywhere
    while len(_calls) > 1 and _calls[1][0]() is None:
        del _calls[0]
    _default = _calls[-1][1]
    _anywhere = _entered[-1].enable if _entered else _default


def is_on() -> bool:
    """Return True if fused operations may be used here."""
    if torch.compiler.is_compiling() and not _COMPILES_CONTEXTS:
        return _anywhere
    here = _here.get()
    return here[-1] if here else _default
