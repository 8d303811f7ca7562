"""Token transformer: the T2T transformer with softmax attention (paper section 3.1, equations 1 and 2)."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import use_fused_attn

from .mlp import Mlp
from .observe import is_observed, is_plain
from .soft_split import (
    fold_modules,
    soft_split,
    soft_split_folded_linear,
    soft_split_norm_linear,
    soft_split_size,
    tokens_to_map,
)

# fx looks for a wrapped function under the name its caller has
torch.fx.wrap('soft_split_folded_linear')
torch.fx.wrap('soft_split_norm_linear')

__all__ = ['TokenTransformer']


class TokenAttention(nn.Module):
    """Single-head attention that changes the width; its values are the skip connection."""
    fused_attn: torch.jit.Final[bool]

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None) -> None:
        """Initialize the attention of tokens of width in_dim into tokens of width dim."""
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.scale = in_dim ** -0.5  # of the input width, as published
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(in_dim, 3 * dim, bias=False, **dd)
        self.attn_drop = nn.Identity()
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, N, in_dim) to (B, N, dim)."""
        return self.attend(self.qkv(x))

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """Map projected tokens (B, N, 3 * dim) to (B, N, dim)."""
        q, k, v = qkv.unsqueeze(1).chunk(3, dim=-1)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            attn = attn.softmax(dim=-1)
            attn = self.attn_drop(attn)
            x = attn @ v
        return v.squeeze(1) + self.proj(x.squeeze(1))


class TokenTransformer(nn.Module):
    """Soft split followed by one transformer layer, the re-structurization of a tokens-to-token step.

    With u the unfolded patches: y = attn(norm1(u)), out = y + mlp(norm2(y)).
    """
    folded: torch.jit.Final[bool]

    def __init__(
            self,
            in_dim: int,
            dim: int = 64,
            kernel_size: int = 3,
            stride: int = 2,
            padding: int = 1,
            device=None,
            dtype=None,
    ) -> None:
        """Initialize the layer.

        Args:
            in_dim: Channels of the map that the soft split reads.
            dim: Width of the tokens.
            kernel_size: Side of a patch of the soft split, in pixels.
            stride: Distance of neighbouring patches, in pixels.
            padding: Zeros added on each side, in pixels.
        """
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = stride
        self.padding = padding
        self.folded = False
        patch_dim = in_dim * kernel_size ** 2
        self.norm1 = nn.LayerNorm(patch_dim, eps=1e-5, **dd)
        self.attn = TokenAttention(patch_dim, dim, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = Mlp(dim, dim, **dd)

    def reparameterize(self) -> None:
        """Store the weights that the norm is folded into, for inference; `timm.utils.reparameterize_model` calls it."""
        if not self.folded and is_plain(self.norm1, self.attn.qkv):
            self.norm1, self.attn.qkv = fold_modules(self.norm1, self.attn.qkv)
            self.folded = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_dim, H, W) to (B, dim, H', W')."""
        height = soft_split_size(x.shape[2], self.kernel_size, self.stride, self.padding)
        width = soft_split_size(x.shape[3], self.kernel_size, self.stride, self.padding)
        x = self._split_attend(x)
        x = x + self.mlp(self.norm2(x))
        return tokens_to_map(x, height, width)

    def _split_attend(self, x: torch.Tensor) -> torch.Tensor:
        """Return attn(norm1(soft_split(x))), tokens (B, N, dim)."""
        if not torch.jit.is_scripting():
            if not is_plain(self.norm1, self.attn.qkv) or is_observed(self.attn):
                return self.attn(self.norm1(soft_split(x, self.kernel_size, self.stride, self.padding)))
        kernel = self.kernel_size, self.stride, self.padding
        weight, bias = self.attn.qkv.weight, self.attn.qkv.bias
        if self.folded:
            x = soft_split_folded_linear(x, weight, bias, self.norm1.eps, *kernel)
        else:
            x = soft_split_norm_linear(x, self.norm1.weight, self.norm1.bias, weight, bias, self.norm1.eps, *kernel)
        return self.attn.attend(x.flatten(2).transpose(1, 2))
