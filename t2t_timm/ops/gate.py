"""When a fused operation may stand for the modules that it is made of: one switch and two kinds of question.

A layer asks about algebra (`is_plain`, `is_unobserved`): may the modules that it would not call be left out? An
operation asks about execution (`is_recorded`, `is_compiled`): who runs what it computes?
"""
import os

import torch
import torch.nn as nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _global

__all__ = ['is_compiled', 'is_plain', 'is_recorded', 'is_unobserved', 'set_fused']

# before torch 2.7 a graph to compile and one to export cannot be told apart
_is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)

_fused = os.environ.get('T2T_TIMM_FUSED', '1') != '0'


class set_fused:
    """Turn the fused operations of every T2T-ViT on or off, from the next call on; as a context manager, for a while.

    Off, each layer runs its equations module by module: unfold, LayerNorm, Linear, torch's dropout, every token of the
    last block. T2T_TIMM_FUSED=0 starts with them off. A scripted model runs the equations either way; a compiled one is
    compiled again.

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


def _has_hooks(module: nn.Module) -> bool:
    if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or 'forward' in module.__dict__
    ):
        return True
    for child in module._modules.values():
        if child is not None and _has_hooks(child):
            return True
    return False


def is_unobserved(x: torch.Tensor, *modules: nn.Module) -> bool:
    """Return True if nothing expects the modules, or anything inside them, to be called with x as they are.

    Hooks and a patched `forward` do (class activation maps, probes, quantization observers, FSDP), and so does fx,
    whose graph is for somebody to read.
    """
    if not _fused or isinstance(x, torch.fx.Proxy):
        return False
    if (
            _global._global_forward_hooks
            or _global._global_forward_pre_hooks
            or _global._global_backward_hooks
            or _global._global_backward_pre_hooks
    ):
        return False
    for module in modules:
        if _has_hooks(module):
            return False
    return True


def is_plain(x: torch.Tensor, *modules: nn.Module, idle: tuple[nn.Module, ...] = ()) -> bool:
    """Return True if reading the weights of the modules is enough, instead of calling them with x.

    They have to be torch's own and unobserved. Adapters (LoRA) and quantizers put modules, or weights, of their own in
    their place, which must be called.

    Args:
        x: Tensor that they would be called with.
        *modules: What should be a Linear or a LayerNorm.
        idle: What should be a GELU, a Dropout or an Identity, or a Sequential of any of all these.
    """
    # fx first: it records that a weight is looked at
    return is_unobserved(x, *modules, *idle) and all(map(_is_weighted, modules)) and all(map(_is_idle, idle))


def _is_weighted(module: nn.Module) -> bool:
    if type(module) is nn.LayerNorm:
        if (module.weight is None) != (module.bias is None):  # the operations read both or none
            return False
    elif type(module) is not nn.Linear:
        return False
    return not hasattr(type(module.weight), '__tensor_flatten__')  # as quantized weights have


def _is_idle(module: nn.Module) -> bool:
    if type(module) is nn.Sequential:  # an adapter, too, has a Linear inside, but a forward of its own
        return all(_is_weighted(m) or _is_idle(m) for m in module._modules.values())
    return type(module) in (nn.Dropout, nn.Identity) or type(module) is nn.GELU and module.approximate == 'none'


def is_recorded() -> bool:
    """Return True if operations are recorded or transformed, so that they must be plain and differentiable.

    Exported and traced graphs run elsewhere, with or without gradients; torch.func and forward-mode derivatives
    transform each operation.
    """
    if torch.compiler.is_compiling():
        return _is_exporting()
    return (
        torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_compiled() -> bool:
    """Return True if operations are compiled or recorded: whoever does that decides how they are executed."""
    return torch.compiler.is_compiling() or is_recorded()
