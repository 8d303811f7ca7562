"""The gate: a fused operation may replace modules if every skipped module is unmodified since import.

A layer asks `can_fuse`. How an operation is executed (traced, compiled, device, dtype), the operation asks itself.
"""
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules import module as _global

from .execution import is_compiled, is_exporting
from .switch import is_on

FEW_VALUES = 2 ** 19  # those of two images of 224 x 224 pixels, or of their maps: docs/development.md
_GLOBAL_HOOKS = tuple(
    getattr(_global, f'_global_{kind}_hooks') for kind in ('forward', 'forward_pre', 'backward', 'backward_pre'))


# What a class was when it was registered: forward and __call__, further methods and children by name, and the check.
_known: dict[type, tuple[Any, ...]] = {}


def register(
        cls: type[nn.Module],
        *methods: str,
        check: Callable[[Any], bool] = lambda module: True,
        **children: tuple[type[nn.Module], ...],
) -> None:
    """Tell the gate what an unmodified module of a class is.

    Args:
        cls: The class itself; its subclasses are not known.
        *methods: Names of methods that are skipped, or that are given less than they expect, besides `forward`.
        check: Further condition that a module has to meet, asked when its children are known to be right.
        **children: The classes of which each skipped child must be one. Other children are not asked about.
    """
    # not if it was patched before this import: functools.wraps copies a function's names, but not its globals
    if getattr(cls.forward, '__globals__', None) is vars(sys.modules[cls.__module__]):
        kept = {name: getattr(cls, name) for name in methods}
        _known[cls] = cls.forward, cls.__call__, kept, children, check


def can_fuse(x: torch.Tensor, layer: nn.Module, *skipped: nn.Module) -> bool:
    """Return True if fused operations may replace the calls that a layer would make with x, and gain by it.

    They may if the switch is on and every skipped module is unmodified since import: a known class with the methods
    that it had then, no hook (global ones included), no replaced `forward`, no weight of a tensor subclass. They gain
    nothing where an accelerator reads few values: launches take the time there, and the equations have the fewest. What
    torch.fx traces is never fused, since its graph is for somebody to read.

    Args:
        x: Tensor that the layer reads.
        layer: The layer that asks. It is being called, so its own hooks do not matter; what is inside it does.
        *skipped: Further modules that would not be called.
    """
    if not is_on() or any(_GLOBAL_HOOKS) or isinstance(x, torch.fx.Proxy):  # to read it would add a node
        return False
    if x.device.type != 'cpu' and not is_compiled() and x.numel() <= FEW_VALUES:  # to compare would fix a free batch
        return False
    return _is_unmodified(layer, is_called=True) and all(_is_unmodified(module) for module in skipped)


def _is_unmodified(module: nn.Module, is_called: bool = False) -> bool:
    """Return True if a module is as its class was registered; of one that is called, only what is inside is asked."""
    cls = type(module)
    if cls not in _known:
        return False
    forward, call, methods, children, check = _known[cls]
    if not is_called and (
            cls.forward is not forward
            or cls.__call__ is not call and not is_exporting()  # torch.export itself replaces __call__
            or 'forward' in module.__dict__
            or module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or module._compiled_call_impl is not None
    ):
        return False
    for name, method in methods.items():
        if getattr(cls, name) is not method or name in module.__dict__:
            return False
    for name, classes in children.items():
        child = module._modules.get(name)
        if child is None or type(child) not in classes or not _is_unmodified(child):
            return False
    return check(module)


def is_dense(*weights: torch.Tensor | None) -> bool:
    """Return True if each weight is None or a dense tensor of no subclass, but for the fake ones of a compiler."""
    return all(
        weight is None or weight.layout is torch.strided and (
            type(weight) in (torch.Tensor, nn.Parameter) or type(weight).__module__.startswith('torch._subclasses'))
        for weight in weights)


def _is_token_norm(norm: nn.LayerNorm) -> bool:
    # The operations read both weight and bias or none, and treat the last axis alone.
    has_both = (norm.weight is None) == (norm.bias is None)
    return has_both and len(norm.normalized_shape) == 1 and is_dense(norm.weight, norm.bias)


register(nn.Linear, check=lambda m: is_dense(m.weight, m.bias))
register(nn.LayerNorm, check=_is_token_norm)
register(nn.GELU, check=lambda m: m.approximate == 'none')
for _cls in (nn.Identity, nn.Dropout, nn.Sequential):  # what a sequence holds is asked for by who skips it
    register(_cls)
