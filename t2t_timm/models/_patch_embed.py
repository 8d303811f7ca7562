"""The tokens-to-token module under the name and with the attributes of timm's PatchEmbed."""
from typing import Any

import torch
import torch.nn as nn

from ..layers import tokens_grid_size

__all__ = ['PatchEmbedView']


class PatchEmbedView(nn.Module):
    """Images to tokens without class token and positions, for what takes a ViT of timm apart.

    It holds the model's own tokens-to-token module. Hooks on the view see the calls of the view alone: to see those of
    the model, hook `tokens_to_token`.
    """
    dynamic_img_pad = False
    patch_size = (16, 16)  # the stride of the tokens; a token reads more

    def __init__(self, model: Any) -> None:
        """View the tokens-to-token module of a T2TViT."""
        super().__init__()
        self.tokens_to_token: Any = model.tokens_to_token
        self.norm = nn.Identity()
        self.img_size = model.img_size
        self.grid_size = model.grid_size
        self.num_patches = model.grid_size[0] * model.grid_size[1]
        self.strict_img_size = self.flatten = not model.dynamic_img_size
        self.check_image = model.check_image

    @property
    def proj(self) -> nn.Module:
        """The last linear map, which makes the tokens; timm's is the only one, and reads the image."""
        return self.tokens_to_token.project

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Return the stride of the tokens, in pixels."""
        return self.patch_size[0] if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return the grid of tokens that an image of (H, W) pixels becomes."""
        return tokens_grid_size(img_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to tokens (B, N, C), or with dynamic_img_size to (B, H', W', C), as timm."""
        x = self.tokens_to_token(self.check_image(x)).permute(0, 2, 3, 1)
        return x.flatten(1, 2) if self.flatten else x
