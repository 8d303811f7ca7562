"""Fused operations: pure functions of tensors with their gradients, and the gate that says when they may be used."""
from .execution import autocast_off, in_chunks
from .gate import POINTWISE, can_fuse, is_plain_call, register, set_fused
from .mlp import mlp_skip
from .performer import performer_attention, performer_skip
from .soft_split import fold_norm_linear, soft_split_linear, soft_split_norm_linear
