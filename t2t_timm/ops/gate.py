"""The gate: may a fused operation replace the modules it implements?

A layer asks `can_fuse`. How an operation is executed (traced, compiled, device, dtype), the operation asks itself.
"""
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules import module as _global

from .execution import is_exporting

__all__ = ['CONTAINER', 'POINTWISE', 'Exactly', 'can_fuse', 'register', 'set_fused']

CONTAINER = object()  # a child whose own children are called: it is asked about itself alone
POINTWISE = object()  # a child of any registered class that treats each token alone

_fused = os.environ.get('T2T_TIMM_FUSED', '1') != '0'


class set_fused:
    """Turn the fused operations of every T2T-ViT on or off, from the next call on; as a context manager, for a while.

    Off, each layer runs its equations module by module: unfold, LayerNorm, Linear, every token of the last block.
    T2T_TIMM_FUSED=0 starts with them off. A scripted model runs the equations either way; a compiled one is compiled
    again.

    Args:
        enable: Whether fused operations may be used.
    """

    def __init__(self, enable: bool = True) -> None:
        global _fused
        self.before = _fused
        _fused = enable

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        global _fused
        _fused = self.before


class Exactly:
    """A child of one class whose own children are of the classes given, in this order, and no more."""

    def __init__(self, cls: type[nn.Module], *children: type[nn.Module]) -> None:
        self.cls = cls
        self.children = children


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
        children: What each child must be, by its name: a class, a tuple of classes, Exactly, POINTWISE, or CONTAINER.
            Other children are not asked about.
        methods: Names of further methods that a fused operation does not call; forward is one of them anyway.
        pointwise: Whether a module of the class treats each token alone.
        check: Further condition that a module has to meet, asked when its children are known to be right.
    """
    kept = tuple((name, getattr(cls, name)) for name in methods)
    _known[cls] = _Known(cls.forward, cls.__call__, kept, tuple((children or {}).items()), pointwise, check)


register(nn.Linear, pointwise=True)
register(nn.Identity, pointwise=True)
register(nn.Dropout, pointwise=True)
register(nn.GELU, pointwise=True, check=lambda m: m.approximate == 'none')
# The operations read both or none.
register(nn.LayerNorm, pointwise=True, check=lambda m: (m.weight is None) == (m.bias is None))
register(nn.Sequential, pointwise=True)  # `_is_expected` asks about the modules in it


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
    if not _fused or isinstance(x, torch.fx.Proxy):
        return False
    if (
            _global._global_forward_hooks
            or _global._global_forward_pre_hooks
            or _global._global_backward_hooks
            or _global._global_backward_pre_hooks
    ):
        return False
    if not _is_untouched(layer):
        return False
    for module in skipped:
        if not _may_be_skipped(module):
            return False
    return True


def _may_be_skipped(module: nn.Module, inside: bool = True) -> bool:
    """Return True if nothing was done to a module that a call of it would show."""
    if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or 'forward' in module.__dict__
    ):
        return False
    cls = type(module)
    known = _known.get(cls)
    if known is None or cls.forward is not known.forward:
        return False
    if cls.__call__ is not known.call and not is_exporting():  # torch.export itself replaces __call__
        return False
    return _is_untouched(module, inside)


def _is_untouched(module: nn.Module, inside: bool = True) -> bool:
    """Return True if a module, apart from being called, is as registered, and so are its children if inside."""
    known = _known.get(type(module))
    if known is None:
        return False
    for name, method in known.methods:
        if getattr(type(module), name) is not method or name in module.__dict__:
            return False
    for weight in module._parameters.values():
        if weight is not None and not _is_plain(weight):
            return False
    if inside:
        for name, expected in known.children:
            if not _is_expected(module._modules.get(name), expected):
                return False
    return known.check is None or known.check(module)


def _is_expected(child: nn.Module | None, expected: Any) -> bool:
    if child is None:
        return False
    cls = type(child)
    if cls is expected:
        return _may_be_skipped(child)
    if expected is POINTWISE:
        known = _known.get(cls)
        if known is None or not known.pointwise:
            return False
        for grandchild in child._modules.values() if cls is nn.Sequential else ():
            if not _is_expected(grandchild, POINTWISE):
                return False
        return _may_be_skipped(child)
    if expected is CONTAINER:
        return _may_be_skipped(child, inside=False)
    if isinstance(expected, Exactly):
        children = list(child._modules.values()) if cls is expected.cls else []
        if len(children) != len(expected.children):
            return False
        for grandchild, grandclass in zip(children, expected.children, strict=True):
            if not _is_expected(grandchild, grandclass):
                return False
        return _may_be_skipped(child, inside=False)
    return isinstance(expected, tuple) and cls in expected and _may_be_skipped(child)


def _is_plain(weight: torch.Tensor) -> bool:
    cls = type(weight)
    return cls is nn.Parameter or cls is torch.Tensor or cls.__module__.startswith('torch._subclasses')  # fake tensors
