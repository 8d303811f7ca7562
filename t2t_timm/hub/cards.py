"""Model cards: one for every tag of the manifest, generated from it and from the code, the same on every machine."""
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from timm.models import get_pretrained_cfg

from ..errors import UserError
from ..files import check_parent, new_text_file
from ..weights.fit import FIRST_LAYERS
from ..weights.manifest import Published, hub_repo, load_manifest, pretrained_cfg, weight_entry
from .complexity import Complexity, count_complexity, known_complexity, tag_complexity
from .snippets import (
    DIGIT,
    PHOTO,
    classification_snippet,
    features_snippet,
    install_snippet,
    scripts_line,
    transformers_snippet,
)

_logger = logging.getLogger(__name__)

__all__ = ['architecture_card', 'card_data', 'for_repo', 'places_to_fill_in', 'stale_cards', 'tag_card', 'write_cards']

_TAGS = ['image-classification', 'timm', 'transformers', 't2t-timm', 't2t-vit']

_TOKENS = {
    FIRST_LAYERS['performer']: 'Performers, whose cost is linear in the number of tokens',
    FIRST_LAYERS['transformer']: 'transformer layers',
}

_HUB = 'https://huggingface.co'

_ANY_USE = (
    'It answers with one of its {num_classes:,} classes whatever it is shown, and its probabilities are not '
    'calibrated. Measure it on your own images before you rely on it, and decide nothing about people by it.')
_LIMITS = {
    'imagenet-1k': 'For photos of single objects, as a backbone, or to fine-tune. How it does on drawings, scans or '
                   "photos unlike ImageNet's was not measured. ImageNet's terms of access allow non-commercial "
                   'research and education.',
    'cifar': 'To compare with the paper. It was fine-tuned on images of 32 x 32 pixels, enlarged; sharper photos were '
             'not measured.',
    'mnist': 'To try the package without a download, and for tests. It was trained on 4,000 images of one white digit '
             'on black: invert dark digits on white paper first. Letters, several digits and printed ones were not '
             'measured.',
}

_FILL_IN = 'FILL IN'
_FOLDER_NAME = 'DIR stands for the path of the folder that holds this card.'


def card_data(name: str) -> ModelCardData:
    """Return the Hub front matter of an architecture.tag; accuracies are in percent."""
    entry = weight_entry(name)
    datasets = load_manifest()['datasets']
    dataset = datasets[entry.dataset]
    reporter = load_manifest()['reporters'][entry.reported_by]
    results = [
        EvalResult(
            task_type='image-classification',
            task_name='Image Classification',
            dataset_type=dataset['hub'],
            dataset_name=dataset['name'],
            dataset_split=dataset['split'],
            metric_type='accuracy',
            metric_name=label,
            metric_value=getattr(entry, key),
            source_name=reporter['name'] if 'url' in reporter else None,
            source_url=reporter.get('url'),
        )
        for key, label in (('top1', 'top-1 accuracy'), ('top5', 'top-5 accuracy')) if getattr(entry, key) is not None
    ]
    fine_tuned = 'in1k_ft' in name
    pretraining = [datasets['imagenet-1k']['hub']] if fine_tuned else []
    return ModelCardData(
        base_model=_repo(name.split('.')[0] + '.in1k') if fine_tuned else None,
        library_name='timm',
        pipeline_tag='image-classification',
        license=entry.license,
        tags=_TAGS,
        datasets=[dataset['hub']] + pretraining,
        metrics=['accuracy'] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def tag_card(name: str, origin: str = '') -> str:
    """Return the model card of an architecture.tag; `origin` says what is known of the file that was converted."""
    entry, cfg, cost = weight_entry(name), pretrained_cfg(name), tag_complexity(name)
    dataset, source = load_manifest()['datasets'][entry.dataset], load_manifest()['sources'][entry.source]
    image = DIGIT if entry.dataset == 'mnist' else PHOTO
    names = "model.pretrained_cfg['label_names'][i]" if 'label_names' in dataset else (
        'timm.data.ImageNetInfo().index_to_description(i)')
    return _card(card_data(name), [
        f'# Model card for {name}',
        _what_it_is(name, dataset),
        '## Model Details',
        '\n'.join([*_figures(cost), *_details(name, entry, cfg, dataset, source)] + [f'- {origin}'] * bool(origin)),
        '## Intended Use and Limits',
        f"{_LIMITS[entry.dataset.rstrip('01')]} {_ANY_USE.format(num_classes=dataset['num_classes'])}",
        '## Model Usage',
        install_snippet('\nt2t-timm digits digits  # 1,000 digits to try it on' if image == DIGIT else ''),
        classification_snippet(name, image, 'RGB', names) + scripts_line(name, entry),
        features_snippet(name, cost),
        transformers_snippet(_repo(name), image) if entry.url else '',  # others are never published
        '## Model Comparison',
        _family(name),
        '## Citation',
        _citation(),
    ])


def architecture_card(
        architecture: str,
        num_classes: int,
        input_size: tuple[int, int, int],
        label_names: Sequence[str] = (),
) -> str:
    """Return the model card of weights that the manifest does not know; `places_to_fill_in` finds what it asks for."""
    cost = count_complexity(architecture, num_classes, input_size)
    data = ModelCardData(library_name='timm', pipeline_tag='image-classification', tags=_TAGS)
    name, mode = 'local-dir:DIR', {1: 'L', 3: 'RGB'}.get(input_size[0])
    return _card(data, [
        f'# Model card for {architecture}',
        f'A Tokens-to-Token ViT (T2T-ViT) for images, of the architecture {architecture} with {num_classes} classes.',
        f'Classes: {", ".join(label_names)}.' if label_names else '',
        '## Model Details',
        '\n'.join([
            *_figures(cost),
            f'- **Trained by:** {_FILL_IN}',
            f'- **Trained on:** {_FILL_IN}: which images, how many of each class, and from where',
            f'- **Accuracy:** {_FILL_IN}: measured on which images',
            f'- **Use and limits:** {_FILL_IN}: what it is for, and what it is not for',
            f'- **Licence:** {_FILL_IN}, and in the lines above as `license`, such as apache-2.0',
        ]),
        '## Model Usage',
        _FOLDER_NAME,
        install_snippet(),
        classification_snippet(
            name, PHOTO, mode, "model.pretrained_cfg['label_names'][i]" if label_names else 'i',
        ) if mode and num_classes else '',
        features_snippet(name, cost),
        transformers_snippet('DIR', PHOTO) if mode == 'RGB' and num_classes else '',
        '## Citation',
        _citation(),
    ])


def for_repo(card: str, repo: str) -> str:
    """Return a card with the name of its Hub repo where it stands for the folder or for another repo."""
    card = re.sub(rf'{_FOLDER_NAME}\s+', '', card).replace('local-dir:DIR', f'hf-hub:{repo}')
    return re.sub(rf"model='(DIR|{re.escape(_repo(''))}[\w.]+)'", f"model='{repo}'", card)


def places_to_fill_in(card: str) -> list[str]:
    """Return the names of the places that an architecture's card asks to fill in and that are not filled in yet."""
    return re.findall(rf'^- \*\*(.+?):\*\* {_FILL_IN}', card, re.MULTILINE)


def _repo(name: str) -> str:
    return hub_repo(name, 't2t-timm')  # the card is the same on every machine


def _card(data: ModelCardData, parts: list[str]) -> str:
    return f'---\n{data.to_yaml()}\n---\n\n' + '\n\n'.join(part.strip('\n') for part in parts if part) + '\n'


def _what_it_is(name: str, dataset: dict[str, Any]) -> str:
    tokens = _TOKENS[get_pretrained_cfg(name).first_conv]  # type: ignore
    trained = 'trained on ImageNet-1k and fine-tuned on' if 'in1k_ft' in name else 'trained on'
    return (
        f'A Tokens-to-Token ViT (T2T-ViT) image classifier, {trained} {dataset["name"]}. It makes its tokens in three '
        f'steps from overlapping patches, with attention ({tokens}) between them, and classifies them with a deep and '
        'narrow transformer.'
    )


def _figures(cost: Complexity) -> list[str]:
    channels, *size = cost.input_size
    return [
        '- **Model Type:** Image classification / feature backbone',
        '- **Model Stats**, counted from the code for one image:',
        f'  - Params (M): {cost.params / 1e6:.2f}, without the position table and random features, which are fixed',
        f'  - GMACs: {_giga(cost.macs)}',
        f'  - Activations (M): {cost.activations / 1e6:.2f}',
        f'  - Image size: {size[0]} x {size[1]}' + ('' if channels == 3 else f', {channels} channels'),
    ]


def _details(
        name: str,
        entry: Published,
        cfg: dict[str, Any],
        dataset: dict[str, Any],
        source: dict[str, Any],
) -> list[str]:
    paper = load_manifest()['paper']
    mean, std = (', '.join(map(str, cfg[k])) for k in ('mean', 'std'))
    resize = 'resized to that size' if cfg.get('crop_mode') == 'squash' else (
        f'resized so that the shorter side is {int(cfg["input_size"][1] / cfg["crop_pct"])}, centre cropped')
    return [
        f'- **Dataset:** {dataset["name"]}',
        *(['- **Pretrain Dataset:** ImageNet-1k'] if 'in1k_ft' in name else []),
        f'- **Preprocessing:** {resize}, {cfg["interpolation"]}; mean {mean}; standard deviation {std}',
        _accuracy(entry, dataset),
        f'- **Original:** {source["name"]}, ' + (
            f'{source["code"]}, [{entry.file}]({entry.url})' if entry.url else 'inside the package'),
        *([f'- **Notes:** {entry.notes}'] if entry.notes else []),
        f'- **Paper:** [{paper["title"]}](https://arxiv.org/abs/{paper["arxiv"]}), {paper["venue"]}',
        f'- **Licence:** `{entry.license}`. {source["notice"]} The code of t2t-timm: Apache License 2.0.',
    ]


def _accuracy(entry: Published, dataset: dict[str, Any]) -> str:
    values = [f'{v} % {label}' for v, label in ((entry.top1, 'top-1'), (entry.top5, 'top-5')) if v is not None]
    if not values:
        return '- **Accuracy:** not known'
    reporter = load_manifest()['reporters'][entry.reported_by]
    line = f'- **Accuracy on {dataset["name"]} ({dataset["split"]}):** {", ".join(values)}, '
    if 'url' not in reporter:
        return line + 'measured by this project'
    return line + f'reported by {reporter["name"]} ({reporter["url"]}); this project has not measured it'


def _family(current: str) -> str:
    """Return a table of the authors' weights for ImageNet-1k, and the current ones."""
    lines = [
        "The authors' weights for ImageNet-1k; each card says who measured the accuracy.",
        '',
        '| weights | image size | params (M) | GMACs | top-1 |',
        '| --- | ---: | ---: | ---: | ---: |',
    ]
    for name, entry in load_manifest()['weights'].items():
        if name != current and (entry.source != 'yitu' or entry.dataset != 'imagenet-1k'):
            continue
        cost, dataset = known_complexity()[name], load_manifest()['datasets'][entry.dataset]['name']
        lines.append('| ' + ' | '.join([
            f'**{name}**' if name == current else f'[{name}]({_HUB}/{_repo(name)})',
            str(pretrained_cfg(name)['input_size'][-1]),
            f'{cost["params"] / 1e6:.2f}',
            _giga(cost['macs']),
            f'{entry.top1}' + (f' ({dataset})' if entry.dataset != 'imagenet-1k' else ''),
        ]) + ' |')
    return '\n'.join(lines)


def _giga(macs: int) -> str:
    return f'{macs / 1e9:.2f}' if macs >= 1e8 else f'{macs / 1e9:.3f}'


def _citation() -> str:
    return f"```bibtex\n{load_manifest()['paper']['citation'].strip()}\n```"


def _cards() -> dict[str, str]:
    counted = {}
    for name in load_manifest()['weights']:
        cost = tag_complexity(name)
        counted[name] = dict(params=cost.params, macs=cost.macs, activations=cost.activations)
    if counted != known_complexity():
        _logger.info(yaml.safe_dump(counted, sort_keys=False))
        raise UserError('hub/complexity.yaml is out of date; it should be what stands above.')
    return {f'{name}.md': tag_card(name) for name in load_manifest()['weights']}


def stale_cards(folder: str | Path) -> list[str]:
    """Return the names of a folder's cards that are missing, out of date, or of no tag."""
    folder = Path(folder)
    cards = _cards()
    present = {path.name: path.read_text(encoding='utf-8') for path in sorted(folder.glob('*.md'))}
    return sorted(name for name in {**present, **cards} if present.get(name) != cards.get(name))


def write_cards(folder: str | Path, check: bool = False) -> None:
    """Write the card of every tag into a folder, or only check those that are there.

    Raises:
        UserError: There is no folder to make it in, check is True and a card is out of date, or a figure in
            hub/complexity.yaml is.
    """
    folder = Path(folder)
    if check:
        if not folder.is_dir():
            raise UserError(f'There is no folder {folder}: name the folder of the cards with --out.')
        stale = stale_cards(folder)
        if stale:
            raise UserError(f'Out of date in {folder}: {", ".join(stale)}. Run `t2t-timm cards --out {folder}`.')
        _logger.info(f'{folder}: every card is up to date.')
        return
    check_parent(folder)
    cards = _cards()
    folder.mkdir(exist_ok=True)
    for name, text in cards.items():
        with new_text_file(folder / name) as file:
            file.write(text)
    _logger.info(f'{folder}: {len(cards)} cards.')
