"""Fused operations: pure functions of tensors with their gradients, and the gate that says when they may be used."""
from .class_token import class_token_attention
from .dropout import add_dropout
from .gate import is_compiled, is_plain, is_recorded, is_unobserved, set_fused
from .mlp import gelu_linear, keeps_less, mlp_skip
from .parts import in_parts
from .performer import performer_attention, performer_skip
from .precision import autocast_off
from .soft_split import fold_norm_linear, soft_split_linear, soft_split_norm_linear
