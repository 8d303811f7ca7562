"""T2T-ViT (Tokens-to-Token ViT) for timm. Importing the package registers every model with timm.

timm and torch, which take seconds, are imported when they are first needed: a model is registered before anybody who
imports timm can ask for it, and the commands that need neither answer at once.
"""
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import _t2t_timm_autoload

from .version import __version__

if TYPE_CHECKING:
    from .models import T2TViT, T2TViTDense
    from .ops import set_fused

__all__ = ['T2TViT', 'T2TViTDense', '__version__', 'set_fused']

_HOMES = {'T2TViT': '.models', 'T2TViTDense': '.models', 'set_fused': '.ops'}
_ROOMS = ('layers', 'models', 'ops', 'weights')


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    if name in _ROOMS:
        return import_module(f'.{name}', __name__)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_ROOMS})


if 'timm.models' in sys.modules:
    import_module('.models', __name__)
else:
    _t2t_timm_autoload.wait()
