"""The weights manifest: what is known of every published file, read from manifest.yaml."""
import os
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from timm.models import list_models

from ..errors import UserError, suggestion

__all__ = [
    'MANIFEST', 'ModelName', 'Published', 'YamlLoader', 'hub_repo', 'known_name', 'load_manifest', 'pretrained_cfg',
    'tagged', 'weight_entry', 'weights_repo',
]

MANIFEST = Path(__file__).parent / 'manifest.yaml'
YamlLoader = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)  # libyaml's loader takes an eighth of the time


class ModelName(NamedTuple):
    """Name of a model: architecture[.tag], the tag '' if there is none."""
    architecture: str
    tag: str = ''

    @classmethod
    def parse(cls, name: str) -> 'ModelName':
        """Split architecture[.tag]."""
        architecture, _, tag = name.partition('.')
        return cls(architecture, tag)

    def __str__(self) -> str:
        return '.'.join(filter(None, self))


@dataclass(frozen=True)
class Published:
    """What manifest.yaml knows of a published file, whose head explains the fields; None is not known."""
    name: ModelName
    file: str
    source: str
    license: str
    reported_by: str
    dataset: str = 'imagenet-1k'
    url: str | None = None  # of the publisher's release
    path: str | None = None  # inside the package
    size: int | None = None
    sha256: str | None = None
    sha384: str | None = None
    sha256_prefix: str | None = None
    hub: dict[str, Any] = field(default_factory=dict)
    top1: float | None = None
    top5: float | None = None
    notes: str | None = None
    input_size: tuple[int, int, int] | None = None
    crop_pct: float | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """Size and hashes, those that are known."""
        known = {k: getattr(self, k) for k in ('size', 'sha256', 'sha384', 'sha256_prefix')}
        return {k: v for k, v in known.items() if v is not None}


def known_name(name: str) -> ModelName:
    """Split architecture[.tag]; a UserError says so if this package does not know both."""
    architecture, tag = model = ModelName.parse(name)
    architectures = list_models('*t2t_vit*')
    if architecture not in architectures:
        raise UserError(
            f'There is no architecture {architecture!r}; there are {", ".join(architectures)}.'
            f'{suggestion(name, [*architectures, *load_manifest()["weights"]])}')
    tags = tagged(architecture)
    if tag and name not in tags:
        raise UserError(
            f'{architecture} has no tag {tag!r}; {"its tags are " + ", ".join(tags) if tags else "it has no tags"}.')
    return model


def tagged(architecture: str) -> list[str]:
    """Return the names of an architecture's published weights, its default first."""
    return [name for name in load_manifest()['weights'] if ModelName.parse(name).architecture == architecture]


@lru_cache(maxsize=None)
def load_manifest() -> dict[str, Any]:
    """Return the whole manifest, each file in `weights` as a Published."""
    with open(MANIFEST, encoding='utf-8') as f:
        manifest = yaml.load(f, YamlLoader)
    for name, entry in manifest['weights'].items():
        source = manifest['sources'][entry['source']]
        where = {'url': source['base_url'] + entry['file']} if 'base_url' in source else {
            'path': str(MANIFEST.parent / entry['file'])}
        manifest['weights'][name] = Published(
            ModelName.parse(name), license=source['license'], hub=manifest['hub'].get(name, {}), **where,
            **{k: _frozen(v) for k, v in entry.items()})
    return manifest


def weight_entry(name: str) -> Published:
    """Return the manifest's entry of an architecture.tag, or raise a KeyError."""
    return load_manifest()['weights'][name]


def hub_repo(name: str, namespace: str | None = None) -> str:
    """Return the Hub repo of an architecture.tag; T2T_TIMM_HUB_NAMESPACE overrides the default namespace."""
    return f"{namespace or os.environ.get('T2T_TIMM_HUB_NAMESPACE') or 't2t-timm'}/{name}"


def weights_repo(name: str) -> str | None:
    """Return the Hub repo that an architecture.tag's weights may come from, None if the Hub must not be used.

    A namespace that the user names is the user's. In the project's own, only files whose hash the manifest knows are
    asked for: until somebody owns that name, anybody could serve weights under it.
    """
    known = os.environ.get('T2T_TIMM_HUB_NAMESPACE') or 'sha256' in weight_entry(name).hub
    return hub_repo(name) if known else None


def pretrained_cfg(name: str, **kwargs: Any) -> dict[str, Any]:
    """Return timm's pretrained cfg of an architecture.tag, or of an architecture without weights; kwargs add to it."""
    cfg = dict(
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=None,
        crop_pct=0.9,  # timm resizes to 248 and crops 224
        interpolation='bicubic',
        fixed_input_size=True,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        classifier='head',
        paper_ids='arXiv:' + load_manifest()['paper']['arxiv'],
        paper_name=load_manifest()['paper']['title'],
    )
    cfg.update(kwargs)
    entry = load_manifest()['weights'].get(name)
    if entry is None:
        return cfg
    dataset = load_manifest()['datasets'][entry.dataset]
    kept = ('num_classes', 'crop_pct', 'crop_mode', 'interpolation', 'mean', 'std', 'label_names')
    cfg.update({k: _frozen(v) for k, v in dataset.items() if k in kept})
    cfg.update({k: getattr(entry, k) for k in ('input_size', 'crop_pct') if getattr(entry, k) is not None})
    cfg.update(license=entry.license, origin_url=load_manifest()['sources'][entry.source].get('code'))
    if entry.path is not None:
        cfg.update(file=entry.path)
    else:
        cfg.update(hf_hub_id=weights_repo(name), url=entry.url)
    return cfg


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
