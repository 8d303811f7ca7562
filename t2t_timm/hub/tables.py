"""The table of pretrained tags: what they cost, how good they are and where their weights would come from."""
import csv
import io
import json
import os
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from timm.models._hub import HF_SAFE_WEIGHTS_NAME

from ..weights.download import is_set, release_path
from ..weights.manifest import load_manifest, pretrained_cfg, weight_entry, weights_repo
from .complexity import known_complexity

__all__ = ['models_csv', 'models_json', 'models_table', 'weights_origin']

_HEADER = (
    'weights', 'params (M)', 'MACs (G)', 'size (MB)', 'top-1', 'reported by', 'source', 'weights would come from')


def weights_origin(name: str) -> str:
    """Say where the weights of an architecture.tag would come from now, in words and without asking the network."""
    entry, repo = weight_entry(name), weights_repo(name)
    if entry.path:
        return 'the package' if os.path.isfile(entry.path) else 'nowhere: missing from the package'
    if repo is not None and isinstance(try_to_load_from_cache(repo, HF_SAFE_WEIGHTS_NAME), str):
        return f'the Hub cache ({repo})'
    release = not is_set('T2T_TIMM_HUB_ONLY')
    downloaded = release and release_path(entry, None).is_file()
    if constants.HF_HUB_OFFLINE:
        return 'the release downloaded before' if downloaded else 'nowhere: offline and in no cache'
    if repo is None and not release:
        return 'nowhere: T2T_TIMM_HUB_ONLY, and no hash on the Hub is known'
    if repo is None:
        return 'the release downloaded before' if downloaded else 'the release'
    if not release:
        return f'the Hub ({repo}) only'
    return f'the Hub ({repo}), then {"the release downloaded before" if downloaded else "the release"}'


def _models() -> list[dict[str, Any]]:
    manifest, models = load_manifest(), []
    for name, entry in manifest['weights'].items():
        cost = known_complexity()[name]
        size = entry.hub.get('size') or entry.size
        if size is None and entry.path:
            size = os.path.getsize(entry.path)
        models.append(dict(
            name=name,
            params=cost['params'],
            macs=cost['macs'],
            size=size,
            top1=entry.top1,
            # A reporter's name may go on, after a comma, with what they did.
            reported_by=manifest['reporters'][entry.reported_by]['name'].split(',')[0] if entry.top1 else None,
            source=manifest['sources'][entry.source]['name'],
            weights_from=weights_origin(name),
        ))
    return models


def models_json() -> str:
    """Return all tags as JSON; size is in bytes, and null if it is not known."""
    return json.dumps(_models(), indent=2)


def models_csv() -> str:
    """Return the tags of ImageNet-1k as CSV, best first, in the columns of timm's results/results-imagenet.csv.

    What is not known is empty. Accuracies are in percent, param_count in 10^6.
    """
    names = 'model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct', 'interpolation'
    out = io.StringIO()
    table = csv.writer(out, lineterminator='\n')
    table.writerow(names)
    weights = load_manifest()['weights']
    of_imagenet = [name for name in weights if weights[name].dataset == 'imagenet-1k']
    for name in sorted(of_imagenet, key=lambda name: -weights[name].top1):
        entry, cfg = weights[name], pretrained_cfg(name)
        accuracy = [
            f'{value:.3f}' for top in (entry.top1, entry.top5) if top is not None for value in (top, 100 - top)]
        table.writerow([
            name, *accuracy, *[''] * (4 - len(accuracy)), f'{known_complexity()[name]["params"] / 1e6:.2f}',
            cfg['input_size'][-1], cfg['crop_pct'], cfg['interpolation']])
    return out.getvalue().rstrip('\n')


def models_table() -> str:
    """Return the table of all tags; a size that is not known is estimated from the parameters and marked ~."""
    rows = [_HEADER]
    for m in _models():
        rows.append((
            m['name'],
            f'{m["params"] / 1e6:.2f}',
            f'{m["macs"] / 1e9:.2f}',
            f'{m["size"] / 1e6:.1f}' if m['size'] else f'~{m["params"] * 4 / 1e6:.1f}',  # the parameters in float32
            '-' if m['top1'] is None else f'{m["top1"]:.3f}',
            m['reported_by'] or '-',
            m['source'],
            m['weights_from'],
        ))
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    numbers = (1, 2, 3, 4)
    return '\n'.join(
        '  '.join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows)
