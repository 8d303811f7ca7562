"""T2T-ViT (Tokens-to-Token ViT) for timm. Importing the package registers every model with timm."""
from ._version import __version__
from .models import T2TViT, T2TViTDense
from .ops import set_fused

__all__ = ['T2TViT', 'T2TViTDense', '__version__', 'set_fused']
