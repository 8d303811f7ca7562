"""Tokens-to-token module (paper section 3.1, figure 4): an image becomes maps of tokens at strides 4, 8 and 16."""
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from timm.models import checkpoint

from .. import ops
from .soft_split import SOFT_SPLITS, soft_split, soft_split_size, tokens_to_map
from .token_performer import TokenPerformer
from .token_transformer import TokenTransformer

__all__ = ['ConvTokens', 'TokensToToken', 'check_image', 'tokens_grid_size']


def tokens_grid_size(img_size: tuple[int, int]) -> tuple[int, int]:
    """Return the grid of tokens that an image of (H, W) pixels becomes: what convolutions give, not H // 16."""
    height, width = img_size
    for split in SOFT_SPLITS:
        height, width = soft_split_size(height, *split), soft_split_size(width, *split)
    return height, width


@torch.fx.wrap
def check_image(x: torch.Tensor, in_chans: int, img_size: tuple[int, int] | None = None) -> torch.Tensor:
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
        layer: type[nn.Module]
        kwargs: dict[str, Any]
        if token_type == 'performer':
            layer, kwargs = TokenPerformer, dict(dd, drop=token_drop_rate)
        else:
            layer, kwargs = TokenTransformer, dd
        self.attention1, self.attention2 = (
            layer(dim, token_dim, *split, **kwargs)
            for dim, split in zip((in_chans, token_dim), SOFT_SPLITS, strict=False))
        self.split = SOFT_SPLITS[2]
        self.project = nn.Linear(token_dim * self.split[0] ** 2, embed_dim, **dd)
        self.grad_checkpointing = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to tokens (B, embed_dim, H', W')."""
        return self.forward_levels(x, 3, last=True)[0]

    def forward_levels(self, x: torch.Tensor, num_levels: int = 3, last: bool = False) -> list[torch.Tensor]:
        """Return the first num_levels maps from image to tokens, at strides 4, 8 and 16; if last, that one alone."""
        if torch.jit.is_scripting():
            levels = self._levels(x, num_levels)
            return levels[-1:] if last else levels
        return self._run_levels(x, num_levels, last)

    @torch.jit.unused
    def _run_levels(self, x: torch.Tensor, num_levels: int, last: bool) -> list[torch.Tensor]:
        levels = partial(checkpoint, self._levels) if self.grad_checkpointing else self._levels
        if last and ops.is_unobserved(x, self):
            return [ops.in_parts(lambda x: levels(x, num_levels)[-1], x)]
        return levels(x, num_levels)[-1:] if last else levels(x, num_levels)

    def _levels(self, x: torch.Tensor, num_levels: int) -> list[torch.Tensor]:
        levels = [self.attention1(x)]
        if num_levels > 1:
            levels.append(self.attention2(levels[0]))
        if num_levels > 2:
            levels.append(self._project(levels[1]))
        return levels

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        """Return project(soft_split(x)), a map (B, embed_dim, H', W')."""
        if not torch.jit.is_scripting():
            if ops.is_plain(x, self.project):
                return ops.soft_split_linear(x, self.project.weight, self.project.bias, *self.split)
        height, width = soft_split_size(x.shape[2], *self.split), soft_split_size(x.shape[3], *self.split)
        return tokens_to_map(self.project(soft_split(x, *self.split)), height, width)

    def prune_levels(self, num_levels: int) -> None:
        """Drop what only levels past num_levels need."""
        if num_levels < 3:
            self.project = nn.Identity()  # type: ignore[assignment]  # nothing asks for its weights any more
        if num_levels < 2:
            self.attention2 = nn.Identity()  # type: ignore[assignment]  # as above


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
        self.soft_split0, self.soft_split1, self.project = (
            nn.Conv2d(dim, dim_out, *split, **dd) for dim, dim_out, split in zip(
                (in_chans, token_dim, token_dim), (token_dim, token_dim, embed_dim), SOFT_SPLITS, strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to tokens (B, embed_dim, H', W')."""
        return self.project(self.soft_split1(self.soft_split0(x)))

    def forward_levels(self, x: torch.Tensor, num_levels: int = 3) -> list[torch.Tensor]:
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
            self.project = nn.Identity()  # type: ignore[assignment]  # nothing asks for its weights any more
        if num_levels < 2:
            self.soft_split1 = nn.Identity()  # type: ignore[assignment]  # as above
