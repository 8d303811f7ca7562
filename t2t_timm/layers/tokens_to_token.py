"""Tokens-to-token module (paper section 3.1, figure 4): an image becomes maps of tokens at strides 4, 8 and 16."""
import math
from typing import List, Optional, Tuple

import torch
import torch.nn as nn
from timm.layers import register_notrace_function

from .observe import is_observed, is_plain, is_traced
from .soft_split import soft_split, soft_split_linear, soft_split_size, tokens_to_map
from .token_performer import TokenPerformer
from .token_transformer import TokenTransformer

torch.fx.wrap('soft_split_linear')  # fx looks for a wrapped function under the name its caller has

__all__ = ['ConvTokens', 'TokensToToken', 'check_image', 'tokens_grid_size']

# how many tokens of the map at stride 4 go through the module at once, on a CPU
TOKENS_PER_THREAD = 2 ** 13


def tokens_grid_size(img_size: Tuple[int, int]) -> Tuple[int, int]:
    """Return the grid of tokens that an image of (H, W) pixels becomes: what convolutions give, not H // 16.

    The soft splits are 7x7 stride 4 padding 2, then twice 3x3 stride 2 padding 1.
    """
    return ((img_size[0] - 3) // 4 + 4) // 4, ((img_size[1] - 3) // 4 + 4) // 4


@torch.fx.wrap
@register_notrace_function
def check_image(x: torch.Tensor, in_chans: int, img_size: Optional[Tuple[int, int]] = None) -> torch.Tensor:
    """Return the images (B, in_chans, H, W) as they are, or say what is wrong with them.

    Args:
        x: Images.
        in_chans: Channels that the model reads.
        img_size: The only (H, W) allowed, or None for any that the soft splits allow.

    Raises:
        ValueError: Wrong number of dimensions or channels, or a size that is not img_size, or is below 3 pixels.
    """
    if x.ndim != 4 or x.shape[1] != in_chans:
        raise ValueError(
            f'Expected images of shape (batch, {in_chans}, height, width), got {list(x.shape)}. '
            'Create the model with in_chans= to read another number of channels.'
        )
    if img_size is not None and (x.shape[2] != img_size[0] or x.shape[3] != img_size[1]):
        raise ValueError(
            f'The model was made for images of {img_size[0]} x {img_size[1]} pixels, got {x.shape[2]} x {x.shape[3]}. '
            'Create it with img_size= for another size, with dynamic_img_size=True for any, or call set_input_size().'
        )
    if x.shape[2] < 3 or x.shape[3] < 3:
        raise ValueError(
            f'The soft splits need images of at least 3 x 3 pixels, got {x.shape[2]} x {x.shape[3]}.')
    return x


class TokensToToken(nn.Module):
    """Three soft splits, with a token performer or token transformer after each of the first two.

    `forward_levels` returns the maps on the way: token_dim channels at strides 4 and 8, embed_dim at stride 16.
    """

    def __init__(
            self,
            token_type: str = 'performer',
            in_chans: int = 3,
            embed_dim: int = 384,
            token_dim: int = 64,
            token_drop_rate: float = 0.1,
            device=None,
            dtype=None,
    ) -> None:
        """Initialize the module.

        Args:
            token_type: 'performer' or 'transformer'.
            in_chans: Channels of the image.
            embed_dim: Width of the tokens that leave.
            token_dim: Width of the tokens inside.
            token_drop_rate: Dropout rate inside the token performers; the token transformers have none, as published.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.token_dim = token_dim
        if token_type == 'performer':
            layer, kwargs = TokenPerformer, dict(dd, drop=token_drop_rate)
        else:
            layer, kwargs = TokenTransformer, dd
        self.attention1 = layer(in_chans, token_dim, kernel_size=7, stride=4, padding=2, **kwargs)
        self.attention2 = layer(token_dim, token_dim, kernel_size=3, stride=2, padding=1, **kwargs)
        self.project = nn.Linear(token_dim * 3 * 3, embed_dim, **dd)

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.jit.is_scripting():
            if not is_plain(self.project):
                height, width = soft_split_size(x.shape[2], 3, 2, 1), soft_split_size(x.shape[3], 3, 2, 1)
                return tokens_to_map(self.project(soft_split(x, 3, 2, 1)), height, width)
        return soft_split_linear(x, self.project.weight, self.project.bias, 3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to tokens (B, embed_dim, H', W')."""
        if not torch.jit.is_scripting():
            num_parts = self._num_parts(x)
            if num_parts > 1:
                return torch.cat([self._forward(part) for part in x.chunk(num_parts)])
        return self._forward(x)

    def _forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._project(self.attention2(self.attention1(x)))

    @torch.jit.unused
    def _num_parts(self, x: torch.Tensor) -> int:
        """Return in how many parts a batch goes through: on a CPU the maps at stride 4 should stay in its caches."""
        if is_traced(x) or x.device.type != 'cpu' or is_observed(self):
            return 1
        num_tokens = x.shape[0] * (x.shape[2] // 4) * (x.shape[3] // 4)
        return math.ceil(num_tokens / (TOKENS_PER_THREAD * torch.get_num_threads()))

    def forward_levels(self, x: torch.Tensor, num_levels: int = 3) -> List[torch.Tensor]:
        """Return the first num_levels maps on the way from image to tokens, at strides 4, 8 and 16."""
        levels = [self.attention1(x)]
        if num_levels > 1:
            levels.append(self.attention2(levels[0]))
        if num_levels > 2:
            levels.append(self._project(levels[1]))
        return levels

    def prune_levels(self, num_levels: int) -> None:
        """Drop what only levels past num_levels need."""
        if num_levels < 3:
            self.project = nn.Identity()
        if num_levels < 2:
            self.attention2 = nn.Identity()


class ConvTokens(nn.Module):
    """The three soft splits as plain convolutions (T2T-ViT_c, paper section 4.3); the interface of TokensToToken."""

    def __init__(
            self,
            in_chans: int = 3,
            embed_dim: int = 384,
            token_dim: int = 64,
            device=None,
            dtype=None,
    ) -> None:
        """Initialize the module: in_chans to token_dim to token_dim to embed_dim channels."""
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.token_dim = token_dim
        self.soft_split0 = nn.Conv2d(in_chans, token_dim, kernel_size=7, stride=4, padding=2, **dd)
        self.soft_split1 = nn.Conv2d(token_dim, token_dim, kernel_size=3, stride=2, padding=1, **dd)
        self.project = nn.Conv2d(token_dim, embed_dim, kernel_size=3, stride=2, padding=1, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to tokens (B, embed_dim, H', W')."""
        return self.project(self.soft_split1(self.soft_split0(x)))

    def forward_levels(self, x: torch.Tensor, num_levels: int = 3) -> List[torch.Tensor]:
        """Return the first num_levels maps on the way from image to tokens, at strides 4, 8 and 16."""
        levels = [self.soft_split0(x)]
        if num_levels > 1:
            levels.append(self.soft_split1(levels[0]))
        if num_levels > 2:
            levels.append(self.project(levels[1]))
        return levels

    def prune_levels(self, num_levels: int) -> None:
        """Drop what only levels past num_levels need."""
        if num_levels < 3:
            self.project = nn.Identity()
        if num_levels < 2:
            self.soft_split1 = nn.Identity()
