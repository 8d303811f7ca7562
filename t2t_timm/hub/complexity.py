"""Parameters, multiply-accumulates and activations of an architecture, counted without computing anything."""
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..ops import set_fused
from ..weights.manifest import YamlLoader

__all__ = ['Complexity', 'count_complexity', 'known_complexity', 'model_complexity']


class Complexity(NamedTuple):
    """What one image costs."""
    params: int
    macs: int
    activations: int


class _Counter(TorchDispatchMode):
    """Adds up the FLOPs and the outputs of the operations whose FLOPs torch knows."""
    flops = activations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        flops = flop_registry.get(func.overloadpacket)
        if flops is not None:
            self.flops += flops(*args, **(kwargs or {}), out_val=out)
            self.activations += out.numel()
        return out


def model_complexity(model: Any, input_size: tuple[int, int, int]) -> Complexity:
    """Count what the published architecture computes for one image, with a model on the meta device.

    Multiply-accumulates are those of convolutions, linear layers and matrix products, the products inside the
    attention included; normalization, softmax, exponentials and elementwise arithmetic are not counted. Activations are
    the elements that the same operations put out, as fvcore counts them. The image is of size (C, H, W).
    """
    model.eval()
    with set_fused(False), torch.no_grad(), _Counter() as counter:
        model(torch.empty(1, *input_size, device='meta'))
    params = sum(p.numel() for p in model.parameters())
    return Complexity(params, counter.flops // 2, counter.activations)


@cache
def count_complexity(architecture: str, num_classes: int, input_size: tuple[int, int, int]) -> Complexity:
    """Count an architecture for a number of classes and images of size (C, H, W)."""
    model = timm.create_model(
        architecture, num_classes=num_classes, in_chans=input_size[0], img_size=input_size[1:], device='meta')
    return model_complexity(model, input_size)


@cache
def known_complexity() -> dict[str, Complexity]:
    """Return what is stored of every architecture.tag: building every model for a table would take long."""
    known = yaml.load(Path(__file__).with_suffix('.yaml').read_text(encoding='utf-8'), YamlLoader)
    return {name: Complexity(**cost) for name, cost in known.items()}
