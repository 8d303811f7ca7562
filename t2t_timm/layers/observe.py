"""Whether somebody looks at, or has replaced, a part of a model that a fast path would walk around."""
import torch
import torch.nn as nn
from torch.nn.modules import module as _global
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ['in_autocast', 'is_exported', 'is_observed', 'is_plain', 'is_traced']

# before torch 2.7 a graph to compile and one to export cannot be told apart
_is_exporting = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or 'forward' in module.__dict__
    )


@torch.jit.ignore
def is_observed(*modules: nn.Module) -> bool:
    """Return True if a hook or a patched `forward` anywhere inside the modules expects them to be called as they are.

    Class activation maps, probing tools, quantization observers and FSDP work through hooks; a fast path that would not
    call a module has to step aside for them.
    """
    return bool(
        _global._global_forward_hooks
        or _global._global_forward_pre_hooks
        or _global._global_backward_hooks
        or _global._global_backward_pre_hooks
        or any(_has_hooks(m) for module in modules for m in module.modules())
    )


@torch.jit.ignore
def is_plain(*modules: nn.Module) -> bool:
    """Return True if the modules are torch's own Linear and LayerNorm, unobserved: reading their weights is enough.

    Adapters (LoRA) and quantizers put modules, or weights, of their own in their place, which must be called.
    """
    for module in modules:
        if type(module) is not nn.Linear and type(module) is not nn.LayerNorm:
            return False
        # in this order: before torch 2.5 the compiler cannot trace the question
        if not torch.compiler.is_compiling() and is_traceable_wrapper_subclass(module.weight):
            return False
    return not is_observed(*modules)


@torch.jit.ignore
def in_autocast(x: torch.Tensor) -> bool:
    """Return True if autocast would change the dtype of what is computed from x; it does not know the meta device."""
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


@torch.jit.ignore
def is_traced(x: torch.Tensor) -> bool:
    """Return True if what is done to x is being recorded, as a graph that must hold for other batches, or compiled."""
    return is_exported(x) or torch.compiler.is_compiling()


@torch.jit.ignore
def is_exported(x: torch.Tensor) -> bool:
    """Return True if what is done to x is being recorded, as a graph that others will read or run elsewhere."""
    return isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing() or _is_exporting()
