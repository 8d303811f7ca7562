"""The model that a command is given."""
import os
from typing import Any

import timm
from timm.models import is_model, model_entrypoint

from ..errors import UserError, file_reason
from ..hub.verify import config_fault
from ..models import T2TViT
from ..weights.manifest import known_name, tagged

__all__ = ['load_t2t_vit']


def load_t2t_vit(name: str, untrained: bool = False, **kwargs: Any) -> T2TViT:
    """Create a T2T-ViT for evaluation, of any name and with any argument that timm.create_model takes.

    Raises:
        UserError: No such model, no weights for it, or no T2T-ViT.
    """
    if ':' not in name:
        if os.path.exists(name):
            raise UserError(
                f'{name} is a file or folder, not the name of a model: write local-dir:DIR for a folder of '
                '`t2t-timm convert`, and convert a checkpoint file first.')
        if is_model(name) and not model_entrypoint(name).__module__.startswith('t2t_timm.'):
            raise UserError(f'{name} is not a T2T-ViT: `t2t-timm models` lists those with weights.')
        architecture, _ = known_name(name)
        if not tagged(architecture) and not untrained:
            raise UserError(
                f'{architecture} has no pretrained weights: `t2t-timm models` lists the models that have.')
    try:
        model = timm.create_model(name, pretrained=not untrained, **kwargs)
    except UserError:
        raise
    except Exception as e:  # nearly anything, for a folder or repo whose files are damaged or do not belong together
        if ':' not in name and not isinstance(e, (RuntimeError, OSError, TypeError, ValueError)):
            raise
        text = file_reason(e) if isinstance(e, OSError) and e.strerror and e.filename is not None else str(e)
        advice, reason = '', ' '.join(text.split()) or type(e).__name__
        if name.startswith('local-dir:'):
            advice, reason = f'; `t2t-timm verify {name[10:]}` says more', config_fault(name[10:]) or reason
        raise UserError(f'{name} cannot be loaded: {reason.rstrip(".")}{advice}.') from e
    if not isinstance(model, T2TViT):
        raise UserError(f'{name} is a {type(model).__name__}, not a T2T-ViT.')
    return model.eval()
