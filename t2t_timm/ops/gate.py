"""The gate: may a fused operation replace the modules it implements?

A layer asks `can_fuse`. How an operation is executed (traced, compiled, device, dtype), the operation asks itself.
"""
import sys
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import ref

import torch
import torch.nn as nn
from torch.nn.modules import module as _global

from _t2t_timm_autoload import is_off

from .execution import is_exporting

__all__ = ['POINTWISE', 'can_fuse', 'is_plain', 'is_plain_call', 'register', 'set_fused']

POINTWISE = object()  # a child of any registered class that treats each token alone

_lock = Lock()
_here: ContextVar[tuple[bool, ...]] = ContextVar('set_fused', default=())  # what this context has entered
_entered: list['set_fused'] = []  # the same of all contexts
# The calls that set the default, the last one of which counts. A call may still become a context manager, which sets no
# default, as long as somebody has what it gave; the first one here cannot.
_calls: list[tuple[Callable[[], Any], bool]] = [(lambda: None, not is_off('T2T_TIMM_FUSED'))]
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


def _is_on() -> bool:
    if torch.compiler.is_compiling() and not _COMPILES_CONTEXTS:
        return _anywhere
    here = _here.get()
    return here[-1] if here else _default


@dataclass(frozen=True)
class _Known:
    """What a class was when it was registered."""
    forward: Callable[..., Any]
    call: Callable[..., Any]
    methods: tuple[tuple[str, Callable[..., Any]], ...]
    children: tuple[tuple[str, Any], ...]
    pointwise: bool
    check: Callable[[Any], bool] | None


_known: dict[type, _Known] = {}


def register(
        cls: type[nn.Module],
        children: dict[str, Any] | None = None,
        methods: tuple[str, ...] = (),
        pointwise: bool = False,
        check: Callable[[Any], bool] | None = None,
) -> None:
    """Tell the gate what an untouched module of a class is, and what its methods are now.

    Args:
        cls: The class itself; its subclasses are not known.
        children: What each child must be, by its name: a class, POINTWISE, or a tuple of a class and of the classes
            that its own children must be, in their order. Other children are not asked about.
        methods: Names of further methods that are skipped, or that are given less than they expect.
        pointwise: Whether a module of the class treats each token alone.
        check: Further condition that a module has to meet, asked when its children are known to be right.
    """
    # functools.wraps copies a function's names, but not its globals.
    if getattr(cls.forward, '__globals__', None) is not vars(sys.modules[cls.__module__]):
        return  # It was patched before this package was imported, and is therefore not known.
    kept = tuple((name, getattr(cls, name)) for name in methods)
    _known[cls] = _Known(cls.forward, cls.__call__, kept, tuple((children or {}).items()), pointwise, check)


def _has_plain_weights(module: nn.Linear | nn.LayerNorm) -> bool:
    return is_plain(module.weight) and is_plain(module.bias)


def _is_plain_norm(norm: nn.LayerNorm) -> bool:
    # The operations read both weight and bias or none, and treat the last axis alone.
    return _has_plain_weights(norm) and (norm.weight is None) == (norm.bias is None) and len(norm.normalized_shape) == 1


register(nn.Linear, pointwise=True, check=_has_plain_weights)
register(nn.LayerNorm, pointwise=True, check=_is_plain_norm)
register(nn.Identity, pointwise=True)
register(nn.Dropout, pointwise=True)
register(nn.GELU, pointwise=True, check=lambda m: m.approximate == 'none')
register(nn.Sequential, pointwise=True, check=lambda m: all(_is_expected(child, POINTWISE) for child in m))


def can_fuse(x: torch.Tensor, layer: nn.Module, *skipped: nn.Module) -> bool:
    """Return True if fused operations may replace the calls that a layer would make with x.

    That is so if the switch is on and all that would not be called is as it was when this package was imported: known
    classes with the methods that they had then, no hook (global ones included), no replaced `forward`, and no weight of
    a tensor subclass. What is not known is not fused; nor is what torch.fx traces, since its graph is for somebody to
    read.

    Args:
        x: Tensor that the layer reads.
        layer: The layer that asks. It is being called, so its own hooks do not matter; what is inside it does.
        *skipped: Further modules that would not be called.
    """
    # Check fx first: reading a weight adds a node to the graph.
    if not _is_on() or isinstance(x, torch.fx.Proxy):
        return False
    if (
            _global._global_forward_hooks
            or _global._global_forward_pre_hooks
            or _global._global_backward_hooks
            or _global._global_backward_pre_hooks
    ):
        return False
    return _is_untouched(layer) and all(_may_be_skipped(module) for module in skipped)


def is_plain_call(module: nn.Module) -> bool:
    """Return True if a call of a module runs the `forward` that its class was registered with, and nothing else."""
    if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or module._compiled_call_impl is not None
            or 'forward' in module.__dict__
    ):
        return False
    cls = type(module)
    known = _known.get(cls)
    # torch.export itself replaces __call__.
    return known is not None and cls.forward is known.forward and (cls.__call__ is known.call or is_exporting())


def _may_be_skipped(module: nn.Module) -> bool:
    """Return True if nothing was done to a module that a call of it would show."""
    return is_plain_call(module) and _is_untouched(module)


def _is_untouched(module: nn.Module) -> bool:
    """Return True if a module, apart from being called, is as registered, and so are its children."""
    cls = type(module)
    known = _known.get(cls)
    if known is None:
        return False
    for name, method in known.methods:
        if getattr(cls, name) is not method or name in module.__dict__:
            return False
    for name, expected in known.children:
        if not _is_expected(module._modules.get(name), expected):
            return False
    return known.check is None or known.check(module)


def _is_expected(child: nn.Module | None, expected: Any) -> bool:
    if child is None:
        return False
    cls = type(child)
    if expected is POINTWISE:
        known = _known.get(cls)
        if known is None or not known.pointwise:
            return False
    elif isinstance(expected, tuple):
        if (cls, *map(type, child._modules.values())) != expected:
            return False
    elif cls is not expected:
        return False
    return _may_be_skipped(child)


def is_plain(weight: torch.Tensor | None) -> bool:
    """Return True if a weight is None or a dense tensor of no subclass."""
    if weight is None:
        return True
    cls = type(weight)
    is_known = cls is nn.Parameter or cls is torch.Tensor or cls.__module__.startswith('torch._subclasses')  # fake ones
    return is_known and weight.layout is torch.strided
