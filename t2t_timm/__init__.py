"""T2T-ViT (Tokens-to-Token ViT) for timm. Importing the package registers every model with timm."""
from .models import T2TViT, T2TViTDense
from .ops import set_fused
from .version import __version__

__all__ = ['T2TViT', 'T2TViTDense', '__version__', 'set_fused']
