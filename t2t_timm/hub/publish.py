"""Publishing: from the publishers' releases to Hub repos that `pretrained=True` loads, and to the manifest's lines."""
import difflib
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import timm
import yaml
from huggingface_hub import get_token
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, get_cache_dir

from ..errors import UserError, suggestion
from ..files import new_text_file, sole_writer
from ..models import T2TViT
from ..weights.download import FAILURES, check_file, file_hash, reason, release_file, retrying
from ..weights.manifest import MANIFEST, YamlLoader, hub_repo, load_manifest, weight_entry
from .cards import for_repo
from .convert import convert, write_config_and_card
from .push import FILES, HUB, LOG_IN, check_reached, hash_and_size, is_refusal, push
from .verify import verify

_logger = logging.getLogger(__name__)

__all__ = ['publish']


def publish(
        tags: Sequence[str] = (),
        namespace: str | None = None,
        source: Path | None = None,
        manifest: Path | None = None,
        private: bool = False,
        dry_run: bool = False,
) -> tuple[str, dict[str, str]]:
    """Fetch, convert, verify and upload published weights, one Hub repo per tag, and read each back from the Hub.

    A tag whose repo holds the files that the manifest and the code describe is skipped. A tag that fails does not stop
    the others. After a kill, the same call goes on: downloads, uploaded files and lines of `manifest` are kept. The
    arguments are those of `t2t-timm publish`, `source` its --from.

    Returns:
        Unified diff that puts the hashes and sizes of what is on the Hub now into the manifest, empty if `manifest` is
        given; and of each architecture.tag that failed, why.

    Raises:
        UserError: A tag or the manifest is wrong, nobody is logged in, or the Hub cannot be reached; nothing has been
            done.
        HFValidationError: No Hub user or organization can have the name of the namespace.
    """
    repos = {name: hub_repo(name, namespace) for name in _names(tags)}
    for repo in repos.values():
        validate_repo_id(repo)
    file = Path(manifest or MANIFEST).resolve()
    head, on_hub = _read_manifest(file)
    before = _manifest(head, on_hub)
    if not dry_run:
        _check_login(namespace=repo.split('/')[0])
    outcomes: Counter[str] = Counter()
    failed: dict[str, str] = {}
    with _work_folder() as work:
        for number, (name, repo) in enumerate(repos.items(), 1):
            _logger.info(f'[{number} of {len(repos)}] {name}')
            try:
                with TemporaryDirectory(dir=work, ignore_cleanup_errors=True) as folder:
                    outcome, sent = _publish_tag(
                        name, repo, on_hub.get(name), Path(folder), source, private, dry_run)
                if sent:
                    on_hub[name] = sent
                if sent and manifest:
                    with new_text_file(file) as f:
                        f.write(_manifest(head, on_hub))
            except FAILURES as e:
                outcome = 'failed'
                failed[name] = str(e).removeprefix(f'{name}: ') if isinstance(e, UserError) else reason(e)
                _logger.warning(f'Failed: {failed[name]}')
            outcomes[outcome] += 1
    counts = ', '.join(f'{count} {outcome}' for outcome, count in outcomes.items())
    summary = f'{len(repos)} {"tag" if len(repos) == 1 else "tags"}: {counts}.'
    _logger.info('\n'.join([summary, *(f'  {name}: {why}' for name, why in failed.items())]))
    path = 't2t_timm/weights/manifest.yaml'
    old, new = (text.splitlines(keepends=True) for text in (before, _manifest(head, on_hub)))
    patch = ''.join(difflib.unified_diff(old, new, f'a/{path}', f'b/{path}'))
    return '' if manifest else patch, failed


def _names(tags: Sequence[str]) -> list[str]:
    released = [name for name, entry in load_manifest()['weights'].items() if entry.url]
    wrong = [tag for tag in tags if tag not in released]
    if wrong:
        raise UserError(
            f'No tag with a release is called {", ".join(wrong)}; there are {", ".join(released)}.'
            f'{suggestion(wrong[0], released)}')
    return list(dict.fromkeys(tags)) or released


def _read_manifest(file: Path) -> tuple[str, dict[str, Any]]:
    """Return a manifest's text up to its last section, `hub`, and what that has of each architecture.tag."""
    try:
        text = file.read_text(encoding='utf-8')
        return text[:text.index('\nhub:') + 1], yaml.load(text, YamlLoader)['hub']
    except (ValueError, yaml.YAMLError) as e:
        raise UserError(f'{file} is not a manifest: it should be a copy of t2t_timm/weights/manifest.yaml.') from e


def _manifest(head: str, on_hub: dict[str, Any]) -> str:
    return head + yaml.safe_dump({'hub': on_hub}, sort_keys=False, width=200)


def _check_login(namespace: str) -> None:
    token, needed = get_token(), f'Publishing to {namespace} needs a Hub token'
    if not token:
        raise UserError(f'{needed}. {LOG_IN}')
    if not (token.isascii() and token.isprintable()):  # an HTTP library would print it in its complaint
        raise UserError(f'{needed}, and the one set holds characters that no token has. {LOG_IN}')
    try:
        HUB.whoami()
    except FAILURES as e:
        check_reached(e)
        if is_refusal(e):  # another answer is none: a server of one's own need not know the question
            raise UserError(f'{needed}, and the one set is not accepted. {LOG_IN}') from e


@contextmanager
def _work_folder() -> Iterator[Path]:
    # always the same, so that what a killed run has left is removed by the next; beside the downloads, where there is
    # space for them
    folder = Path(get_cache_dir()) / 't2t-timm-publish'
    with sole_writer(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _publish_tag(
        name: str,
        repo: str,
        known: dict[str, Any] | None,
        folder: Path,
        source: Path | None,
        private: bool,
        dry_run: bool,
) -> tuple[str, dict[str, Any] | None]:
    """Return what was done, and the hash and size of the weights if they were published."""
    if known and not dry_run and _is_there(name, repo, known, folder):
        _logger.info(f'{repo} is there already and equal.')
        return 'already there', None
    if source is None:
        file = release_file(name)
    else:
        file = Path(source) / weight_entry(name).file
        if not file.is_file():
            raise UserError(f'{source} does not hold {file.name}, which is at {weight_entry(name).url}.')
        check_file(file, weight_entry(name).facts, name)
    converted = convert(file, name, folder / 'converted', checked=True)
    _name_repo(converted, repo)
    verdict = verify(str(file), str(converted), name)
    if not verdict.good:
        why = next((line.strip() for line in verdict.lines if 'loads strictly: no' in line), verdict.lines[-1])
        raise UserError(f'{file} and what it was converted to do not agree: {why}')
    _logger.info(f'Both load strictly; {verdict.lines[-1]}.')
    weights = converted / HF_SAFE_WEIGHTS_NAME
    facts = {'sha256': file_hash(weights), 'size': weights.stat().st_size}
    if known and known != facts:
        _logger.warning(
            f'{name}: the manifest expects other weights in {repo} (sha256 {known["sha256"]}): a t2t-timm that was '
            'installed with it will refuse these.')
    push(converted, repo, private=private, dry_run=dry_run)
    if dry_run:
        return 'checked, not sent', None
    _read_back(name, repo, converted, folder)
    return 'published', facts


def _is_there(name: str, repo: str, known: dict[str, Any], folder: Path) -> bool:
    """Return whether a repo has the weights that the manifest knows, and the config and card of today."""
    if hash_and_size(repo, HF_SAFE_WEIGHTS_NAME) != (known['sha256'], known['size']):
        return False
    write_config_and_card(folder, cast(T2TViT, timm.create_model(name, device='meta')))
    _name_repo(folder, repo)
    small = ((file, (folder / file).read_bytes()) for file in FILES if file != HF_SAFE_WEIGHTS_NAME)
    return all(hash_and_size(repo, file) == (git_hash(data), len(data)) for file, data in small)


def _name_repo(folder: Path, repo: str) -> None:
    card = folder / 'README.md'  # as push uploads it
    card.write_text(for_repo(card.read_text(encoding='utf-8'), repo), encoding='utf-8', newline='\n')


def _read_back(name: str, repo: str, converted: Path, folder: Path) -> None:
    for file in FILES:
        try:
            found = file_hash(retrying(partial(HUB.hf_hub_download, repo, file, cache_dir=folder / 'read-back'), name))
        except FAILURES as e:
            raise UserError(f'{repo} was uploaded, but {file} could not be read back. {reason(e)}') from e
        sent = file_hash(converted / file)
        if found != sent:
            raise UserError(
                f'{repo} was uploaded, but {file} came back with the sha256 {found} instead of {sent}. '
                'Publish it again; if that does not help, delete the repo first.')
    _logger.info(f'{repo} was read back and is equal.')
