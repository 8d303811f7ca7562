"""The table of pretrained tags: what they cost, how good they are, and where their weights are."""
import csv
import io
import json
import logging
import os
from collections import Counter
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError
from huggingface_hub.utils import validate_repo_id
from timm.models._hub import HF_SAFE_WEIGHTS_NAME

from ..weights.download import FAILURES, is_set, reason, release_path
from ..weights.manifest import hub_repo, load_manifest, pretrained_cfg, weight_entry, weights_repo
from .complexity import known_complexity
from .push import check_reached, hash_and_size
from .verify import Verdict

_logger = logging.getLogger(__name__)

__all__ = ['compare_with_hub', 'models_csv', 'models_json', 'models_table', 'weights_origin']


def weights_origin(name: str) -> str:
    """Say where the weights of an architecture.tag would come from now, in words and without asking the network."""
    entry, repo = weight_entry(name), weights_repo(name)
    if entry.path:
        return 'the package' if os.path.isfile(entry.path) else 'nowhere: missing from the package'
    if repo is not None and isinstance(try_to_load_from_cache(repo, HF_SAFE_WEIGHTS_NAME), str):
        return f'the Hub cache ({repo})'
    downloaded = release_path(entry, None).is_file()
    release = None if is_set('T2T_TIMM_HUB_ONLY') else f'the release{" downloaded before" * downloaded}'
    if constants.HF_HUB_OFFLINE:
        return release if release and downloaded else 'nowhere: offline and in no cache'
    if repo is None:
        return release or 'nowhere: T2T_TIMM_HUB_ONLY, and no hash on the Hub is known'
    return f'the Hub ({repo}), then {release}' if release else f'the Hub ({repo}) only'


def _models() -> list[dict[str, Any]]:
    manifest = load_manifest()
    return [
        dict(
            name=name,
            params=known_complexity()[name].params,
            macs=known_complexity()[name].macs,
            size=entry.hub.get('size') or entry.size,
            top1=entry.top1,
            # A reporter's name may go on, after a comma, with what they did.
            reported_by=manifest['reporters'][entry.reported_by]['name'].split(',')[0],
            source=manifest['sources'][entry.source]['name'],
            weights_from=weights_origin(name),
        )
        for name, entry in manifest['weights'].items()
    ]


def models_json() -> str:
    """Return all tags as JSON; size is in bytes, and null if it is not known."""
    return json.dumps(_models(), indent=2)


def models_csv() -> str:
    """Return the tags of ImageNet-1k as CSV, best first, in the columns of timm's results/results-imagenet.csv.

    What is not known is empty. Accuracies are in percent, param_count in 10^6.
    """
    out = io.StringIO()
    table = csv.DictWriter(out, lineterminator='\n', fieldnames=(
        'model', 'top1', 'top1_err', 'top5', 'top5_err', 'param_count', 'img_size', 'crop_pct', 'interpolation'))
    table.writeheader()
    of_imagenet = [entry for entry in load_manifest()['weights'].values() if entry.dataset == 'imagenet-1k']
    for entry in sorted(of_imagenet, key=lambda entry: -entry.top1):
        name = str(entry.name)
        cfg, params = pretrained_cfg(name), known_complexity()[name].params
        row = dict(
            model=name, param_count=f'{params / 1e6:.2f}', img_size=cfg['input_size'][-1], crop_pct=cfg['crop_pct'],
            interpolation=cfg['interpolation'])
        for key, value in (('top1', entry.top1), ('top5', entry.top5)):
            if value is not None:
                row.update({key: f'{value:.3f}', f'{key}_err': f'{100 - value:.3f}'})
        table.writerow(row)
    return out.getvalue().rstrip('\n')


def models_table() -> str:
    """Return the table of all tags; a size that is not known is estimated from the parameters and marked ~."""
    rows = [(
        'weights', 'params (M)', 'MACs (G)', 'size (MB)', 'top-1', 'reported by', 'source', 'weights would come from')]
    for m in _models():
        rows.append((
            m['name'],
            f'{m["params"] / 1e6:.2f}',
            f'{m["macs"] / 1e9:.2f}',
            f'{m["size"] / 1e6:.1f}' if m['size'] else f'~{m["params"] * 4 / 1e6:.1f}',  # the parameters in float32
            f'{m["top1"]:.3f}',
            m['reported_by'],
            m['source'],
            m['weights_from'],
        ))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return '\n'.join(
        '  '.join(f'{cell:{side}{width}}' for cell, side, width in zip(row, '<>>>><<<', widths, strict=True)).rstrip()
        for row in rows)


def compare_with_hub() -> Verdict:
    """Compare the Hub's weights with the manifest, one HEAD request per tag that has a release.

    Good if every tag's weights are there and equal to what the manifest knows of them. A UserError says if the Hub
    cannot be reached.
    """
    tags = {name: entry for name, entry in load_manifest()['weights'].items() if entry.url}
    validate_repo_id(hub_repo(next(iter(tags))))
    _logger.info(f'Asking {constants.ENDPOINT} for {len(tags)} repos.')
    found = {name: _compare(hub_repo(name), entry.hub) for name, entry in tags.items()}
    width = max(map(len, tags))
    lines = [f'{name:{width}}  {state:7}  {words}' for name, (state, words) in found.items()]
    counts = Counter(state for state, _ in found.values())
    lines.append(f'{len(tags)} tags: {", ".join(f"{count} {state}" for state, count in counts.items())}')
    return Verdict(lines, set(counts) == {'equal'})


def _compare(repo: str, known: dict[str, Any]) -> tuple[str, str]:
    try:
        sha256, size = hash_and_size(repo, HF_SAFE_WEIGHTS_NAME)
    except GatedRepoError:
        return 'gated', f'access to {repo} has to be asked for'
    except FAILURES as e:
        check_reached(e)
        return 'error', f'{repo}: {reason(e)}'
    if sha256 is None:
        return 'missing', f'there is no {repo}/{HF_SAFE_WEIGHTS_NAME}, or it is private'
    if not known:
        return 'unknown', f'{repo} is there; this version of t2t-timm knows no hash to compare with'
    if len(sha256) != 64:
        return 'unknown', f'{repo} is there; {constants.ENDPOINT} gives no SHA-256 to compare'
    if (sha256, size) != (known['sha256'], known['size']):
        return 'stale', f'{repo} has sha256 {sha256}, {size} bytes; the manifest has {known["sha256"]}'
    return 'equal', repo
