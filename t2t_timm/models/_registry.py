"""Registration of models, unless timm itself has a model of the same name."""
import logging
from collections.abc import Callable
from typing import Any

import timm.models as timm_models  # while timm is being imported it has no attribute 'models' yet
from timm.models import is_model, model_entrypoint
from timm.models import register_model as timm_register_model

_logger = logging.getLogger(__name__)


def register_model(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Register an entrypoint with timm under its own name, unless timm itself has a model of that name."""
    name = fn.__name__
    if is_model(name) and model_entrypoint(name).__module__ != fn.__module__:
        _logger.debug(f'timm has its own {name} ({model_entrypoint(name).__module__}); leaving it alone.')
        return fn
    setattr(timm_models, name, fn)  # as timm.models.deit_tiny_patch16_224 is
    return timm_register_model(fn)
