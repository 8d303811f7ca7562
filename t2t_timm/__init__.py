"""T2T-ViT (Tokens-to-Token ViT) for timm. Importing the package registers every model with timm."""
from .models import T2TViT, T2TViTDense
from .version import __version__

__all__ = ['T2TViT', 'T2TViTDense', '__version__']
