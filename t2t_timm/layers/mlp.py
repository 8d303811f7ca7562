"""The MLP of blocks and token layers: timm's, which keeps less for its gradient on a CPU."""
import torch
from timm.layers import Mlp as TimmMlp

from .. import ops

__all__ = ['Mlp']


class Mlp(TimmMlp):
    """timm's MLP, its activation made again in the gradient where `ops.gelu_linear` does so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, N, C) to (B, N, C)."""
        x = self.fc1(x)
        if not torch.jit.is_scripting():
            if self.is_plain(x) and ops.keeps_less(x):  # fx first: its x has no values to ask for
                return self.drop2(ops.gelu_linear(x, self.fc2.weight, self.fc2.bias))
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(x)))))

    @torch.jit.unused
    def is_plain(self, x: torch.Tensor) -> bool:
        """Return whether a fused operation may stand for what follows fc1: its own modules, and no dropout."""
        dropouts = self.drop1, self.drop2
        return ops.is_plain(x, self.fc2, idle=(self.act, self.norm, *dropouts)) and not any(
            drop.training and drop.p > 0. for drop in dropouts)
