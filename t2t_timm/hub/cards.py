"""Model cards: one for every tag of the manifest, generated from it and from the code, the same on every machine."""
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from timm.models import get_pretrained_cfg

from ..errors import UserError
from ..files import new_text_file
from ..layers import SOFT_SPLITS, soft_split_size
from ..recipes import recipe_names
from ..weights.fit import FIRST_LAYERS
from ..weights.manifest import load_manifest, pretrained_cfg, weight_entry
from .complexity import Complexity, count_complexity, known_complexity, tag_complexity

_logger = logging.getLogger(__name__)

__all__ = ['architecture_card', 'card_data', 'stale_cards', 'tag_card', 'write_cards']

_TAGS = ['image-classification', 'timm', 'transformers', 't2t-timm', 't2t-vit']

_TOKENS = {
    FIRST_LAYERS['performer']: 'Performer layers, attention linear in the number of tokens',
    FIRST_LAYERS['transformer']: 'transformer layers',
}


def card_data(name: str) -> ModelCardData:
    """Return the Hub front matter of an architecture.tag; accuracies are in percent."""
    entry = weight_entry(name)
    datasets = load_manifest()['datasets']
    dataset = datasets[entry['dataset']]
    reporter = load_manifest()['reporters'][entry['reported_by']]
    results = [
        EvalResult(
            task_type='image-classification',
            task_name='Image Classification',
            dataset_type=dataset['hub'],
            dataset_name=dataset['name'],
            dataset_split=dataset['split'],
            metric_type='accuracy',
            metric_name=label,
            metric_value=entry[key],
            source_name=reporter['name'] if 'url' in reporter else None,
            source_url=reporter.get('url'),
        )
        for key, label in (('top1', 'top-1 accuracy'), ('top5', 'top-5 accuracy')) if key in entry
    ]
    pretraining = [datasets['imagenet-1k']['hub']] if 'in1k_ft' in name else []
    return ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        license=entry['license'],
        tags=_TAGS,
        datasets=[dataset['hub']] + pretraining,
        metrics=['accuracy'] if results else None,
        model_name=name if results else None,
        eval_results=results or None,
    )


def tag_card(name: str, origin: str = '') -> str:
    """Return the model card of an architecture.tag; `origin` says what is known of the file that was converted."""
    entry, cfg, cost = weight_entry(name), pretrained_cfg(name), tag_complexity(name)
    dataset, source = load_manifest()['datasets'][entry['dataset']], load_manifest()['sources'][entry['source']]
    return _card(card_data(name), [
        f'# {name}',
        _what_it_is(name, entry, dataset, source) + (f'\n- {origin}' if origin else ''),
        '## Figures',
        _figures(cost, cfg) + '\n' + _accuracy(entry, dataset),
        _how_counted(),
        '## Usage',
        _usage(name, cost),
        _scripts(name, entry),
        '## The family',
        _family(name),
        '## Citation',
        _citation(),
        '## Licence',
        f"{source['notice']} The Hub calls this licence `{entry['license']}`. The code of t2t-timm is under the Apache "
        'License 2.0.',
    ])


def architecture_card(
        architecture: str,
        num_classes: int,
        input_size: tuple[int, int, int],
        label_names: Sequence[str] = (),
) -> str:
    """Return the model card of weights that the manifest does not know."""
    cost = count_complexity(architecture, num_classes, input_size)
    data = ModelCardData(library_name='timm', pipeline_tag='image-classification', tags=_TAGS)
    return _card(data, [
        f'# {architecture}',
        f'Weights of the T2T-ViT architecture {architecture} with {num_classes} classes. Who trained them, on what, '
        'how accurate they are and under which licence they stand was not known when they were converted: say so here, '
        'and put `license`, `datasets` and `model-index` into the front matter, before publishing them.',
        f'Classes: {", ".join(label_names)}.' if label_names else '',
        '## Figures',
        _figures(cost),
        _how_counted(),
        '## Usage',
        '`local-dir:DIR` names the folder of this card; pushed to the Hub, it is `hf-hub:USER/REPO`.',
        _usage('local-dir:DIR', cost),
        '## Citation',
        _citation(),
    ])


def _card(data: ModelCardData, parts: list[str]) -> str:
    return f'---\n{data.to_yaml()}\n---\n\n' + '\n\n'.join(part.strip('\n') for part in parts if part) + '\n'


def _what_it_is(name: str, entry: dict[str, Any], dataset: dict[str, Any], source: dict[str, Any]) -> str:
    paper = load_manifest()['paper']
    tokens = _TOKENS[get_pretrained_cfg(name).first_conv]  # type: ignore
    trained = 'trained on ImageNet-1k and fine-tuned on' if 'in1k_ft' in name else 'trained on'
    text = (
        f'A Tokens-to-Token ViT for image classification, {trained} {dataset["name"]}. T2T-ViT turns an image into '
        f'tokens in three overlapping soft splits, with a layer of attention ({tokens}) after each of the first two, '
        'and classifies them with a deep and narrow transformer.'
    )
    origin = (
        f'- Weights: {source["name"]}, [{entry["file"]}]({entry["url"]})' if 'url' in entry else
        f'- Weights: trained by {source["name"]}, inside the package t2t-timm'
    )
    if entry['dataset'] == 'mnist':
        text += ' It reads white digits on black; invert dark digits on white paper first.'
    lines = [f'- Paper: [{paper["title"]}](https://arxiv.org/abs/{paper["arxiv"]}), {paper["venue"]}', origin]
    if 'code' in source:
        lines.append(f'- Published code: {source["code"]}')
    if 'notes' in entry:
        lines.append(f'- {entry["notes"]}')
    return text + '\n\n' + '\n'.join(lines)


def _figures(cost: Complexity, cfg: dict[str, Any] | None = None) -> str:
    size = ' x '.join(map(str, cost.input_size[1:]))
    lines = [
        f'- Parameters (M): {cost.params / 1e6:.2f}',
        f'- MACs (G): {_giga(cost.macs)}',
        f'- Activations (M): {cost.activations / 1e6:.2f}',
        f'- Image size: {size} pixels, {cost.input_size[0]} channels',
    ]
    if cfg is not None:
        mean, std = (', '.join(map(str, cfg[k])) for k in ('mean', 'std'))
        resize = 'resized to that size' if cfg.get('crop_mode') == 'squash' else (
            f'resized so that the shorter side is {int(cost.input_size[1] / cfg["crop_pct"])}, centre cropped')
        lines.append(
            f'- Preprocessing: {resize}, {cfg["interpolation"]}; mean {mean}; standard deviation {std}')
    return '\n'.join(lines)


def _accuracy(entry: dict[str, Any], dataset: dict[str, Any]) -> str:
    values = [f'{entry[k]} % {label}' for k, label in (('top1', 'top-1'), ('top5', 'top-5')) if k in entry]
    if not values:
        return '- Accuracy: not known'
    reporter = load_manifest()['reporters'][entry['reported_by']]
    line = f'- Accuracy on {dataset["name"]} ({dataset["split"]}): {", ".join(values)}, '
    if 'url' not in reporter:
        return line + 'measured by this project'
    return line + f'reported by {reporter["name"]} ({reporter["url"]}); this project has not measured it'


def _how_counted() -> str:
    return (
        'Parameters, MACs and activations are computed from the code, for one image: multiply-accumulates of '
        'convolutions, linear layers and matrix products, those inside the attention included, as the published '
        'architecture computes them; activations are the elements that these operations put out. Sinusoidal positions '
        'and random features are fixed, and not counted as parameters.'
    )


def _usage(name: str, cost: Complexity) -> str:
    height, width = cost.input_size[1:]
    sizes = list(zip(_map_sizes(height), _map_sizes(width), strict=True))
    maps = ', '.join(f'(1, {c}, {h}, {w})' for c, (h, w) in zip((64, 64, cost.num_features), sizes, strict=True))
    return f'''\
Once t2t-timm is installed, timm knows the model.

### Classification

```python
import timm
import torch
from PIL import Image

model = timm.create_model('{name}', pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)

image = Image.open('image.jpg').convert('RGB')
with torch.no_grad():
    logits = model(transform(image).unsqueeze(0))
probabilities, classes = logits.softmax(dim=1).topk(5)
```

or `t2t-timm classify image.jpg --model {name}` in a shell.

### Features

```python
model = timm.create_model('{name}', pretrained=True, features_only=True).eval()
maps = model(transform(image).unsqueeze(0))
# strides 4, 8 and 16: {maps}
```

### Embeddings

```python
model = timm.create_model('{name}', pretrained=True, num_classes=0).eval()
images = transform(image).unsqueeze(0)
embedding = model(images)  # (1, {cost.num_features})
tokens = model.forward_features(images)  # (1, {1 + sizes[2][0] * sizes[2][1]}, {cost.num_features}), class token first
```

`img_size=(H, W)` makes a model for another image size, `dynamic_img_size=True` one for any.
'''


def _scripts(name: str, entry: dict[str, Any]) -> str:
    architecture = name.split('.')[0]
    recipe = next(r for r in (f'{architecture}_{entry["dataset"]}', architecture) if r in recipe_names())
    notes, data = '', 'DATA'
    if '.tl_' in name:
        notes = '\nThe recipe trains without token labeling, which train.py does not know.\n'
    elif entry['dataset'] == 'mnist':
        data = 'DIGITS'
        notes = (
            '\n`t2t-timm digits DATA` writes the 1,000 held-out digits, on which the accuracy was measured: they are '
            'not for training. From a checkout of t2t-timm, `python tools/make_digits.py DIGITS` writes both, 4,000 '
            'to train on and these 1,000.\n')
    return f'''\
### timm's scripts

```sh
python validate.py --data-dir DATA --model {name} --pretrained
python train.py --data-dir {data} --config $(t2t-timm recipe {recipe})
```
{notes}'''


def _family(current: str) -> str:
    lines = [
        '| weights | data set | pixels | parameters (M) | MACs (G) | activations (M) | top-1 | top-5 | reported by |',
        '| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |',
    ]
    manifest = load_manifest()
    for name, entry in manifest['weights'].items():
        cost = known_complexity()[name]
        reporter = manifest['reporters'][entry['reported_by']]['name'].split(', ')[0] if 'top1' in entry else ''
        lines.append('| ' + ' | '.join([
            f'**{name}**' if name == current else name,
            manifest['datasets'][entry['dataset']]['name'],
            str(pretrained_cfg(name)['input_size'][-1]),
            f'{cost["params"] / 1e6:.2f}',
            _giga(cost['macs']),
            f'{cost["activations"] / 1e6:.2f}',
            *(str(entry.get(key, '')) for key in ('top1', 'top5')),
            reporter,
        ]) + ' |')
    return '\n'.join(lines)


def _map_sizes(size: int) -> list[int]:
    sizes = []
    for split in SOFT_SPLITS:
        size = soft_split_size(size, *split)
        sizes.append(size)
    return sizes


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
        UserError: check is True and a card, or a figure in hub/complexity.yaml, is out of date.
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
    cards = _cards()
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in cards.items():
        with new_text_file(folder / name) as file:
            file.write(text)
    _logger.info(f'{folder}: {len(cards)} cards.')
