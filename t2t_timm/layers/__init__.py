"""Building blocks of T2T-ViT: plain modules and functions, usable alone."""
from .attention import GhostAttention, GhostMlp, SqueezeExciteAttention
from .positions import join_positions, sinusoidal_pos_embed
from .soft_split import SOFT_SPLITS, soft_split, soft_split_size, tokens_to_map
from .token_performer import TokenPerformer, performer_attention
from .token_transformer import TokenTransformer
from .tokens_to_token import ConvTokens, TokensToToken, check_image, tokens_grid_size
