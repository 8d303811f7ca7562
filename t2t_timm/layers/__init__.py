"""Building blocks of T2T-ViT: plain modules and functions, usable alone."""
from .attention import ClassTokenAttention, GhostAttention, GhostMlp, SqueezeExciteAttention
from .block import Block
from .mlp import Mlp, gelu_linear, pointwise
from .observe import is_observed, is_plain
from .pos_embed import sinusoidal_pos_embed
from .soft_split import (
    SOFT_SPLITS,
    fold_modules,
    fold_norm_linear,
    soft_split,
    soft_split_folded_linear,
    soft_split_linear,
    soft_split_norm_linear,
    soft_split_size,
    tokens_to_map,
)
from .token_performer import TokenPerformer, performer_attention, performer_skip
from .token_transformer import TokenTransformer
from .tokens_to_token import ConvTokens, TokensToToken, check_image, tokens_grid_size
