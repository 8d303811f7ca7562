"""Model cards: one for every tag of the manifest, generated from it and from the code, the same on every machine."""
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..errors import UserError
from ..files import check_parent, new_text_file
from ..recipes import recipe_names
from ..version import REPOSITORY
from ..weights.manifest import load_manifest, pretrained_cfg, weight_entry
from .complexity import count_complexity, known_complexity

_logger = logging.getLogger(__name__)

__all__ = ['architecture_card', 'for_repo', 'places_to_fill_in', 'tag_card', 'write_cards']

_TEMPLATE = Path(__file__).parent / 'card.jinja'
_TAGS = ['image-classification', 'timm', 'transformers', 't2t-timm', 't2t-vit']
_NAMESPACE = 't2t-timm'  # whatever the user's: the card is the same on every machine
_OWN_LABEL = "model.pretrained_cfg['label_names'][i]"  # Python of the name of class i


def tag_card(name: str, origin: str = '') -> str:
    """Return the model card of an architecture.tag; `origin` says what is known of the file that was converted."""
    entry, cfg, manifest = weight_entry(name), pretrained_cfg(name), load_manifest()
    dataset, reporter = manifest['datasets'][entry.dataset], manifest['reporters'][entry.reported_by]
    architecture, fine_tuned = entry.name.architecture, 'in1k_ft' in name
    results = [
        EvalResult(
            task_type='image-classification',
            task_name='Image Classification',
            dataset_type=dataset['hub'],
            dataset_name=dataset['name'],
            dataset_split=dataset['split'],
            metric_type='accuracy',
            metric_name=f'top-{k} accuracy',
            metric_value=value,
            source_name=reporter['name'] if 'url' in reporter else None,
            source_url=reporter.get('url'),
        )
        for k, value in ((1, entry.top1), (5, entry.top5)) if value is not None
    ]
    data = dict(
        base_model=f'{_NAMESPACE}/{architecture}.in1k' if fine_tuned else None,
        license=entry.license,
        datasets=[dataset['hub']] + [manifest['datasets']['imagenet-1k']['hub']] * fine_tuned,
        metrics=['accuracy'],
        model_name=name,
        eval_results=results,
    )
    return _card(
        data, architecture, cfg['num_classes'], cfg['input_size'], name=name, model=name,
        label=_OWN_LABEL if 'label_names' in dataset else 'timm.data.ImageNetInfo().index_to_description(i)',
        repo=f'{_NAMESPACE}/{name}' if entry.url else None,  # what is in the package is never published
        entry=entry, cfg=cfg, dataset=dataset, source=manifest['sources'][entry.source], reporter=reporter,
        fine_tuned=fine_tuned, origin=origin,
        family=[  # the authors' weights for ImageNet-1k, and these
            (other, pretrained_cfg(other)['input_size'][-1], known_complexity()[other], published.top1)
            for other, published in manifest['weights'].items()
            if other == name or (published.source, published.dataset) == ('yitu', 'imagenet-1k')],
        recipe=next(r for r in (f'{architecture}_{entry.dataset}', architecture) if r in recipe_names()),
    )


def architecture_card(
        architecture: str,
        num_classes: int,
        input_size: tuple[int, int, int],
        label_names: Sequence[str] = (),
) -> str:
    """Return the model card of weights that the manifest does not know; `places_to_fill_in` finds what it asks for."""
    return _card(
        {}, architecture, num_classes, input_size, name=architecture, model='local-dir:DIR', repo='DIR',
        label=_OWN_LABEL if label_names else 'i', entry=None, label_names=label_names)


def _card(
        data: dict[str, Any],
        architecture: str,
        num_classes: int,
        input_size: tuple[int, int, int],
        **facts: Any,
) -> str:
    """Return the template filled in; `data` is the Hub's front matter, whose accuracies are in percent."""
    pyramid = timm.create_model(
        architecture, features_only=True, in_chans=input_size[0], img_size=input_size[1:], device='meta')
    card = ModelCard.from_template(
        ModelCardData(library_name='timm', pipeline_tag='image-classification', tags=_TAGS, **data),
        str(_TEMPLATE),
        cost=count_complexity(architecture, num_classes, input_size),
        maps=[tuple(features.shape) for features in pyramid(torch.empty(1, *input_size, device='meta'))],
        mode={1: 'L', 3: 'RGB'}.get(input_size[0]),
        num_classes=num_classes,
        input_size=input_size,
        paper=load_manifest()['paper'],
        repository=REPOSITORY,
        namespace=_NAMESPACE,
        **facts,
    )
    return f'{card}\n'


def for_repo(card: str, repo: str) -> str:
    """Return a card with the name of its Hub repo where it stands for the folder or for another repo."""
    card = re.sub(r'DIR stands for the path of the folder that holds this card\.\s+', '', card)
    card = card.replace('local-dir:DIR', f'hf-hub:{repo}')
    return re.sub(rf"model='(DIR|{_NAMESPACE}/[\w.]+)'", f"model='{repo}'", card)


def places_to_fill_in(card: str) -> list[str]:
    """Return the names of the places that an architecture's card asks to fill in and that are not filled in yet."""
    return re.findall(r'^- \*\*(.+?):\*\* FILL IN', card, re.MULTILINE)


def write_cards(folder: str | Path, check: bool = False) -> None:
    """Write the card of every tag into a folder, or only check those that are there; a UserError says what is old."""
    folder = Path(folder)
    check_parent(folder)
    counted = {}
    for name, entry in load_manifest()['weights'].items():
        cfg = pretrained_cfg(name)
        counted[name] = count_complexity(entry.name.architecture, cfg['num_classes'], cfg['input_size'])
    if counted != known_complexity():
        _logger.info(yaml.safe_dump({name: cost._asdict() for name, cost in counted.items()}, sort_keys=False))
        raise UserError('hub/complexity.yaml is out of date; it should be what stands above.')
    cards = {f'{name}.md': tag_card(name) for name in counted}
    if check:
        present = {path.name: path.read_text(encoding='utf-8') for path in folder.glob('*.md')}
        stale = sorted(name for name in present | cards if present.get(name) != cards.get(name))
        if stale:
            raise UserError(f'Out of date in {folder}: {", ".join(stale)}. Run `t2t-timm cards --out {folder}`.')
        _logger.info(f'{folder}: every card is up to date.')
        return
    folder.mkdir(exist_ok=True)
    for name, text in cards.items():
        with new_text_file(folder / name) as file:
            file.write(text)
    _logger.info(f'{folder}: {len(cards)} cards.')
