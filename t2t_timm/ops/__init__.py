"""Fused operations, functions of tensors and of the modules whose weights they read, and the gate to them."""
from .attention import class_token_attention
from .execution import autocast_off, in_chunks
from .gate import can_fuse, is_dense, register
from .mlp import mlp_skip
from .performer import performer_skip
from .soft_split import soft_split_linear, soft_split_norm_linear, view_patches
from .switch import set_fused
