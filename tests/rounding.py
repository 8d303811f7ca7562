"""Devices that this machine may not have, stood for by tensor modes: TF32's rounding, and no float64."""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
CONVOLUTIONS = (aten.convolution, aten.convolution_backward)
PRODUCTS = (
    aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.linear, aten.matmul,
    aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward,
)


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """Return float32 values rounded to the 10 bits of TF32, to nearest."""
    if x.dtype != torch.float32:
        return x
    return (x.contiguous().view(torch.int32) + (1 << 12) & ~((1 << 13) - 1)).view(torch.float32)


class TF32(TorchDispatchMode):
    """Rounds what convolutions multiply, as cuDNN does by PyTorch's default; and what matrix products do, if asked.

    The second is `torch.set_float32_matmul_precision('high')`.
    """

    def __init__(self, products: bool = False) -> None:
        super().__init__()
        self.rounded = CONVOLUTIONS + PRODUCTS * products
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in self.rounded:
            self.count += 1
            args = tree_map_only(torch.Tensor, to_tf32, args)
        return func(*args, **kwargs or {})


class NoFloat64(TorchDispatchMode):
    """Refuses float64 tensors on one device, as MPS does."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor) and x.dtype in (torch.float64, torch.complex128) \
                    and x.device.type == self.device:
                raise TypeError(f'{func}: {self.device} has no float64')
        return out
