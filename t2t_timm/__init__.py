"""T2T-ViT (Tokens-to-Token ViT) for timm. Importing the package registers every model with timm."""
import sys
from pathlib import Path

from .version import __version__

__all__ = ['T2TViT', 'T2TViTDense', '__version__', 'set_fused']


def _is_command() -> bool:
    args = sys.orig_argv[1:]
    return '-m t2t_timm.cli' in ' '.join(args) or Path(*args[:1]).stem == 't2t-timm'


if not _is_command():  # torch takes seconds to import, and the command line answers some questions without it
    from .models import T2TViT, T2TViTDense
    from .ops import set_fused
