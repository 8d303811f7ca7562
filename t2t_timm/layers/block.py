"""The transformer block of the backbone: timm's, which can also compute the class token's row alone."""
import torch
from timm.models.vision_transformer import Block as TimmBlock

from .attention import ClassTokenAttention

__all__ = ['Block']


class Block(TimmBlock):
    """timm's pre-norm block, which can also compute the output row of the class token alone."""

    def class_token(self, x: torch.Tensor) -> torch.Tensor:
        """Return `self(x)[:, :1]`: tokens (B, N, C) to the class token (B, 1, C).

        An attention that needs every token's output, as squeeze-excitation does, is computed whole.
        """
        y = self.norm1(x)
        y = self.attn.class_token(y) if isinstance(self.attn, ClassTokenAttention) else self.attn(y)[:, :1]
        x = x[:, :1] + self.drop_path1(self.ls1(y))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
