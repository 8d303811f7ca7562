"""The model that a command is given."""
from typing import Any

import timm
from timm.models import is_model, model_entrypoint

from ..errors import UserError
from ..models import T2TViT

__all__ = ['load_t2t_vit']


def load_t2t_vit(name: str, untrained: bool = False, **kwargs: Any) -> T2TViT:
    """Create a T2T-ViT for evaluation.

    Args:
        name: Any name that timm.create_model takes: an architecture, with a tag, local-dir:DIR, hf-hub:REPO.
        untrained: Give it random weights instead of pretrained ones.
        **kwargs: Further arguments of timm.create_model.

    Raises:
        UserError: No such model, no weights for it, or no T2T-ViT.
    """
    if ':' not in name and not is_model(name):
        raise UserError(f'timm does not know the model {name!r}: `t2t-timm models` lists those with weights.')
    if ':' not in name and not model_entrypoint(name).__module__.startswith('t2t_timm.'):
        raise UserError(f'{name} is not a T2T-ViT: `t2t-timm models` lists those with weights.')
    try:
        model = timm.create_model(name, pretrained=not untrained, **kwargs)
    except (RuntimeError, FileNotFoundError, TypeError) as e:
        raise UserError(f'{name}: {e}') from e
    if not isinstance(model, T2TViT):
        raise UserError(f'{name} is a {type(model).__name__}, not a T2T-ViT.')
    return model.eval()
