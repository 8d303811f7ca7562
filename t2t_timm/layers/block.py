"""The transformer block of the backbone: timm's, able to answer for the class token alone."""
import torch
from timm.models.vision_transformer import Block as TimmBlock

from .attention import ClassTokenAttention
from .observe import is_plain

__all__ = ['Block']


class Block(TimmBlock):
    """timm's pre-norm block, which can also compute the output row of the class token alone."""

    def class_token(self, x: torch.Tensor) -> torch.Tensor:
        """Return `self(x)[:, :1]`: tokens (B, N, C) to the class token (B, 1, C).

        An attention that needs every token's output, as squeeze-excitation does, is computed whole; so is one whose
        projection is an adapter or quantized.
        """
        y = self.norm1(x)
        plain = type(self.attn) is ClassTokenAttention and is_plain(self.attn.qkv)
        y = self.attn.class_token(y) if plain else self.attn(y)[:, :1]
        x = x[:, :1] + self.drop_path1(self.ls1(y))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
