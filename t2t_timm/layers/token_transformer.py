"""Token transformer: the T2T transformer with softmax attention (paper section 3.1, equations 1 and 2)."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Mlp, use_fused_attn

from .. import ops
from .soft_split import soft_split, soft_split_size, tokens_to_map


class TokenAttention(nn.Module):
    """Single-head attention that changes the width; its values are the skip connection."""
    fused_attn: torch.jit.Final[bool]

    def __init__(self, in_dim: int, dim: int, device=None, dtype=None) -> None:
        """Initialize the attention of tokens of width in_dim into tokens of width dim."""
        dd = {'device': device, 'dtype': dtype}
        super().__init__()
        self.scale = in_dim ** -0.5  # the input width's, as published
        self.fused_attn = use_fused_attn()
        self.qkv = nn.Linear(in_dim, 3 * dim, bias=False, **dd)
        self.attn_drop = nn.Identity()
        self.proj = nn.Linear(dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (B, N, in_dim) to (B, N, dim)."""
        return self.attend(self.qkv(x))

    def attend(self, qkv: torch.Tensor) -> torch.Tensor:
        """Map projected tokens (B, N, 3 * dim) to (B, N, dim)."""
        # chunk() would fix the batch size of an exported graph, unflatten() that of torch's older ONNX exporter.
        q, k, v = qkv.reshape(qkv.shape[0], 1, qkv.shape[1], 3, qkv.shape[2] // 3).unbind(-2)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
            x = self.attn_drop(attn.softmax(dim=-1)) @ v
        return v.squeeze(1) + self.proj(x.squeeze(1))


class TokenTransformer(nn.Module):
    """Soft split followed by one transformer layer, the re-structurization of a tokens-to-token step.

    With u the unfolded patches: y = attn(norm1(u)), out = y + mlp(norm2(y)).
    """

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
        self.split = (kernel_size, stride, padding)
        patch_dim = in_dim * kernel_size ** 2
        self.norm1 = nn.LayerNorm(patch_dim, eps=1e-5, **dd)
        self.attn = TokenAttention(patch_dim, dim, **dd)
        self.norm2 = nn.LayerNorm(dim, eps=1e-5, **dd)
        self.mlp = Mlp(dim, dim, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, in_dim, H, W) to (B, dim, H', W')."""
        height, width = soft_split_size(x.shape[2], *self.split), soft_split_size(x.shape[3], *self.split)
        if not torch.jit.is_scripting():
            if ops.can_fuse(x, self, *self.mlp.children()):
                return tokens_to_map(ops.in_chunks(self._fused, x, height * width), height, width)

        y = self.attn(self.norm1(soft_split(x, *self.split)))
        return tokens_to_map(y + self.mlp(self.norm2(y)), height, width)

    @torch.jit.unused
    def _fused(self, x: torch.Tensor) -> torch.Tensor:
        """Return out, (B, N, dim), by fused operations."""
        y = self.attn.attend(ops.soft_split_norm_linear(x, self.norm1, self.attn.qkv, self.split))
        return ops.mlp_skip(y, self.norm2, self.mlp.fc1, self.mlp.fc2)


def _is_as_written(layer: TokenTransformer) -> bool:
    classes = [nn.Linear, nn.GELU, nn.Dropout, nn.Identity, nn.Linear, nn.Dropout]
    if [type(m) for m in layer.mlp.children()] != classes:
        return False
    return not any(drop.training and drop.p > 0. for drop in (layer.mlp.drop1, layer.mlp.drop2))


# The attention is called on chunks of a batch.
ops.register(TokenAttention, qkv=(nn.Linear,), attn_drop=(nn.Identity,), proj=(nn.Linear,))
ops.register(
    TokenTransformer,
    check=_is_as_written,
    norm1=(nn.LayerNorm,), attn=(TokenAttention,), norm2=(nn.LayerNorm,), mlp=(Mlp,),
)
