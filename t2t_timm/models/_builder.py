"""How timm builds a T2T-ViT: pretrained cfgs from the manifest, where weights come from, feature pyramids."""
from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg, get_pretrained_cfg, resolve_pretrained_cfg

from ..weights.download import pretrained_file
from ..weights.fit import checkpoint_filter_fn
from ..weights.manifest import ModelName, load_manifest, pretrained_cfg, tagged
from ._features import T2TFeaturePyramid

_SOURCE_KEYS = ('source', 'state_dict', 'file', 'url', 'hf_hub_id', 'hf_hub_filename')  # entries of a pretrained cfg


def pretrained_cfgs(*architectures: str, **kwargs: Any) -> dict[str, Any]:
    """Return the pretrained cfgs of architectures: of each of their tags, or a plain one if they have no weights.

    Args:
        *architectures: Names of the architectures.
        **kwargs: Further entries of each cfg.
    """
    names = [name for architecture in architectures for name in tagged(architecture) or [architecture]]
    return {name: pretrained_cfg(name, **kwargs) for name in names}


def _manifest_name(variant: str, cfg: Any, overlay: dict[str, Any]) -> str | None:
    """Return the architecture.tag whose weights timm would load, or None if the user has named another source."""
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg=cfg, pretrained_cfg_overlay=overlay)
    name = str(ModelName(cfg.architecture, cfg.tag or ''))
    if name not in load_manifest()['weights']:
        return None
    registered = get_pretrained_cfg(name)
    return name if all(getattr(cfg, k) == getattr(registered, k) for k in _SOURCE_KEYS) else None


def build_t2t_vit(
        model_cls: Callable[..., Any],
        variant: str,
        pretrained: bool = False,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: dict[str, Any] | None = None,
        **kwargs: Any,
) -> Any:
    """Build a T2T-ViT, through timm, for an entrypoint.

    features_only=True gives the pyramid of strides 4, 8 and 16; feature_cls='getter' timm's view of the blocks.
    The weights of a tag of the manifest are fetched and checked by `weights.download`; those of another source that the
    caller names (`hf-hub:`, `local-dir:`, file, url, state_dict) by timm itself.

    Args:
        model_cls: Class of the model.
        variant: Name of the architecture.
        pretrained: Load pretrained weights.
        pretrained_cfg: Tag or pretrained cfg, by default the architecture's first tag.
        pretrained_cfg_overlay: Entries that replace those of the pretrained cfg.
        **kwargs: Arguments of the model and of timm's builder.

    Raises:
        UserError: The weights could not be fetched, or are not what the manifest describes.
        ValueError: The checkpoint is another architecture's.
    """
    feature_cls = kwargs.pop('feature_cls', None) or T2TFeaturePyramid
    out_indices = kwargs.pop('out_indices', (0, 1, 2) if feature_cls is T2TFeaturePyramid else 3)
    overlay = dict(pretrained_cfg_overlay or {})
    filter_fn = checkpoint_filter_fn
    name = _manifest_name(variant, pretrained_cfg, overlay) if pretrained else None
    if name is not None:
        named_file = overlay.get('file')
        overlay['file'] = str(pretrained_file(name, kwargs.get('cache_dir')))

        def filter_fn(state_dict: dict[str, Any], model: Any) -> dict[str, Any]:
            model.pretrained_cfg['file'] = named_file  # no path of this machine: the cfg may be published
            return checkpoint_filter_fn(state_dict, model)

    return build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=filter_fn,
        feature_cfg=dict(out_indices=out_indices, feature_cls=feature_cls),
        **kwargs,
    )
