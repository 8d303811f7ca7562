"""Tokens-to-token module (paper section 3.1, figure 4): an image becomes maps of tokens at strides 4, 8 and 16."""
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from timm.layers import to_2tuple
from timm.models import checkpoint

from .. import ops
from .soft_split import SOFT_SPLITS, soft_split, soft_split_size, tokens_to_map
from .token_performer import TokenPerformer
from .token_transformer import TokenTransformer


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
        ValueError: Wrong number of dimensions or channels, whole numbers, or a size that is not img_size, or is below
            3 pixels.
    """
    if x.ndim != 4 or x.shape[1] != in_chans:
        advice = 'Create the model with in_chans= to read another number of channels.'
        if x.ndim == 3:
            advice = 'One image is a batch of 1: x[None].'
        elif x.ndim == 4 and x.shape[3] == in_chans:
            advice = 'The channels go before height and width: x.movedim(-1, 1).'
        raise ValueError(
            f'Expected images of shape (batch, {in_chans}, height, width), got {list(x.shape)}. {advice}'
        )
    if not x.is_floating_point():
        dtype = 'others' if torch.jit.is_scripting() else str(x.dtype)  # to TorchScript a dtype is a number
        raise ValueError(
            f'Expected images of floating-point numbers, got {dtype}. Divide pixels by 255 and normalize them, as '
            'timm.data.create_transform does.'
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


class TokenEmbed(nn.Module):
    """What timm's VisionTransformer asks of its patch embedding; a subclass has the three steps from image to tokens.

    Attributes are those of timm's PatchEmbed. patch_size is the stride of the tokens; a token reads more pixels.
    """
    step_names: tuple[str, str, str]  # the modules of the steps
    dynamic_img_pad: torch.jit.Final[bool]
    flatten: torch.jit.Final[bool]

    if TYPE_CHECKING:  # To nn.Module, what a subclass registers is Tensor | Module.
        def __getattr__(self, name: str) -> Any: ...

    def __init__(
            self,
            img_size: int | tuple[int, int] = 224,
            patch_size: int | tuple[int, int] = 16,
            in_chans: int = 3,
            embed_dim: int = 384,
            norm_layer: Callable[..., nn.Module] | None = None,
            output_fmt: str | None = None,
            strict_img_size: bool = True,
            dynamic_img_pad: bool = False,
            token_dim: int = 64,
            device=None,
            dtype=None,
    ) -> None:
        """Initialize the interface.

        Args:
            img_size: Image size (H, W), in pixels.
            patch_size: Stride of the tokens, in pixels: 16.
            in_chans: Channels of the image.
            embed_dim: Width of the tokens that leave.
            norm_layer: Norm of the tokens that leave.
            output_fmt: 'NHWC' for tokens (B, H', W', C), None for (B, N, C).
            strict_img_size: Take images of img_size alone.
            dynamic_img_pad: Changes nothing: the soft splits read images of any size.
            token_dim: Width of the tokens inside.

        Raises:
            ValueError: Another patch_size or output_fmt, or an img_size below 3 x 3 pixels.
        """
        super().__init__()
        if output_fmt not in (None, 'NHWC'):
            raise ValueError(f"The tokens-to-token module has output_fmt None or 'NHWC', not {output_fmt!r}.")
        self.in_chans = in_chans
        self.token_dim = token_dim
        self.flatten = output_fmt is None
        self.strict_img_size = strict_img_size
        self.dynamic_img_pad = dynamic_img_pad
        self.grad_checkpointing = False
        self.patch_size = (16, 16)
        self.set_input_size(img_size, patch_size)
        self.norm = norm_layer(embed_dim, device=device, dtype=dtype) if norm_layer else nn.Identity()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == 'proj':
            raise AttributeError(
                'T2T-ViT has no patch_embed.proj to replace: replace patch_embed.project, its last linear map, or the '
                'whole of patch_embed.'
            )
        super().__setattr__(name, value)

    @property
    @torch.jit.unused
    def proj(self) -> nn.Module:
        """The last linear map, for code that reads the weights of timm's PatchEmbed."""
        return self.project

    def set_input_size(
            self,
            img_size: int | tuple[int, int] | None = None,
            patch_size: int | tuple[int, int] | None = None,
    ) -> None:
        """Change the image size (H, W), in pixels.

        Raises:
            ValueError: A size below 3 x 3 pixels, or another patch_size than 16.
        """
        if patch_size is not None and to_2tuple(patch_size) != self.patch_size:
            raise ValueError(f'The tokens of T2T-ViT have a stride of 16 pixels: patch_size cannot be {patch_size}.')
        if img_size is None:
            return
        size = tuple(to_2tuple(img_size))
        if len(size) != 2 or min(size) < 3:
            raise ValueError(f'img_size must be at least 3 x 3 pixels for the soft splits, not {size}.')
        self.img_size = (int(size[0]), int(size[1]))
        self.grid_size = tokens_grid_size(self.img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Enable or disable gradient checkpointing."""
        self.grad_checkpointing = enable

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Return the stride of the tokens, in pixels."""
        return self.patch_size[0] if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Return the grid of tokens that an image of (H, W) pixels becomes."""
        return tokens_grid_size(img_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map images (B, in_chans, H, W) to tokens (B, N, C) or, NHWC, (B, H', W', C)."""
        return self.tokens(self.maps(self.check(x))[-1])

    def maps(self, x: torch.Tensor, num_maps: int = 3) -> list[torch.Tensor]:
        """Return the first num_maps maps (B, C, H', W') on the way from image to tokens, at strides 4, 8 and 16."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            # Reentrant checkpoints give no gradient without one of their input, which images do not need.
            return checkpoint(self._maps, x, num_maps, use_reentrant=False)
        return self._maps(x, num_maps)

    def _maps(self, x: torch.Tensor, num_maps: int) -> list[torch.Tensor]:
        maps = [self.step(x, 0)]
        for i in range(1, num_maps):
            maps.append(self.step(maps[-1], i))
        return maps

    def check(self, x: torch.Tensor) -> torch.Tensor:
        """Return images (B, in_chans, H, W) as they are, or raise a ValueError that says what is wrong with them."""
        return check_image(x, self.in_chans, self.img_size if self.strict_img_size else None)

    def tokens(self, x: torch.Tensor) -> torch.Tensor:
        """Return the last map, (B, C, H', W'), as the normalized tokens (B, N, C) or, NHWC, (B, H', W', C)."""
        x = x.permute(0, 2, 3, 1)
        return self.norm(x.flatten(1, 2) if self.flatten else x)


class TokensToToken(TokenEmbed):
    """Three soft splits, with a token performer or token transformer after each of the first two."""
    step_names = 'attention1', 'attention2', 'project'

    def __init__(
            self,
            token_type: str = 'performer',
            in_chans: int = 3,
            embed_dim: int = 384,
            token_dim: int = 64,
            token_drop_rate: float = 0.1,
            bias: bool = True,
            device=None,
            dtype=None,
            **kwargs: Any,
    ) -> None:
        """Initialize the module.

        Args:
            token_type: 'performer' or 'transformer'.
            in_chans: Channels of the image.
            embed_dim: Width of the tokens that leave.
            token_dim: Width of the tokens inside.
            token_drop_rate: Dropout rate inside the token performers; the token transformers have none, as published.
            bias: Add a bias to the last linear map.
            **kwargs: Further arguments of TokenEmbed.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__(in_chans=in_chans, embed_dim=embed_dim, token_dim=token_dim, **kwargs, **dd)
        layer: type[nn.Module]
        if token_type == 'performer':
            layer, layer_args = TokenPerformer, dict(dd, drop=token_drop_rate)
        else:
            layer, layer_args = TokenTransformer, dd
        self.attention1 = layer(in_chans, token_dim, *SOFT_SPLITS[0], **layer_args)
        self.attention2 = layer(token_dim, token_dim, *SOFT_SPLITS[1], **layer_args)
        self.split = SOFT_SPLITS[2]
        self.project = nn.Linear(token_dim * self.split[0] ** 2, embed_dim, bias=bias, **dd)

    def step(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Return map number `index`, 0 to 2, from the one before it, or from the images."""
        if index == 0:
            return self.attention1(x)
        return self.attention2(x) if index == 1 else self._project(x)

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        """Return project(soft_split(x)), a map (B, embed_dim, H', W')."""
        height, width = soft_split_size(x.shape[2], *self.split), soft_split_size(x.shape[3], *self.split)
        if not torch.jit.is_scripting():
            if ops.can_fuse(x, self):
                return ops.soft_split_linear(x, self.project.weight, self.project.bias, self.split)
        return tokens_to_map(self.project(soft_split(x, *self.split)), height, width)


ops.register(TokensToToken, project=(nn.Linear,))


class ConvTokens(TokenEmbed):
    """The three soft splits as plain convolutions (T2T-ViT_c, paper section 4.3)."""
    step_names = 'soft_split0', 'soft_split1', 'project'

    def __init__(
            self,
            in_chans: int = 3,
            embed_dim: int = 384,
            token_dim: int = 64,
            bias: bool = True,
            device=None,
            dtype=None,
            **kwargs: Any,
    ) -> None:
        """Initialize the module: in_chans to token_dim to token_dim to embed_dim channels.

        Args:
            in_chans: Channels of the image.
            embed_dim: Width of the tokens that leave.
            token_dim: Width of the tokens inside.
            bias: Add a bias to the last convolution.
            **kwargs: Further arguments of TokenEmbed.
        """
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__(in_chans=in_chans, embed_dim=embed_dim, token_dim=token_dim, **kwargs, **dd)
        self.soft_split0 = nn.Conv2d(in_chans, token_dim, *SOFT_SPLITS[0], **dd)
        self.soft_split1 = nn.Conv2d(token_dim, token_dim, *SOFT_SPLITS[1], **dd)
        self.project = nn.Conv2d(token_dim, embed_dim, *SOFT_SPLITS[2], bias=bias, **dd)

    def step(self, x: torch.Tensor, index: int) -> torch.Tensor:
        """Return map number `index`, 0 to 2, from the one before it, or from the images."""
        if index == 0:
            return self.soft_split0(x)
        return self.soft_split1(x) if index == 1 else self.project(x)
