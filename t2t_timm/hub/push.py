"""Publishing a folder of converted weights as a Hub repo."""
import json
import logging
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from timm.models._hub import HF_SAFE_WEIGHTS_NAME

from ..errors import UserError
from ..version import __version__
from ..weights.download import FAILURES, reason
from ..weights.manifest import hub_repo
from .cards import for_repo, places_to_fill_in

_logger = logging.getLogger(__name__)

__all__ = ['FILES', 'check_repo', 'default_repo', 'push']

FILES = (HF_SAFE_WEIGHTS_NAME, 'config.json', 'README.md')  # all of a repo: nothing pickled


def push(
        folder: Path,
        repo: str | None = None,
        private: bool = False,
        dry_run: bool = False,
        force: bool = False,
) -> str:
    """Upload a folder's weights, config and card to the Hub and return the name that timm loads them by.

    The repo is created if there is none. Files that the repo already holds are left alone. The card that is uploaded
    names the repo where the one in the folder says `local-dir:DIR`.

    Args:
        folder: Folder as `t2t-timm convert` writes it.
        repo: Hub repo, by default the one that `pretrained=True` would load the folder's architecture.tag from.
        private: Make the repo private if it is created.
        dry_run: Only say what would be uploaded; keeps off the network.
        force: Upload a card that still has places to fill in.

    Raises:
        UserError: A file is missing, the card has places to fill in, the config names no tag, or the Hub refused.
    """
    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f'{folder} has no {", ".join(missing)}: name a folder that `t2t-timm convert` wrote.')
    repo = repo or default_repo(folder)
    check_repo(repo)
    card = _read_text(folder / 'README.md')
    to_fill_in = places_to_fill_in(card)
    if to_fill_in and not force:
        raise UserError(
            f'{folder / "README.md"} does not say yet: {", ".join(to_fill_in)}. Write it there, or upload the card as '
            'it is with --force.')
    if '/OWNER/' in card:
        _logger.warning('The card does not say yet where t2t-timm is: put its address in the place of OWNER.')
    files: dict[str, Path | bytes] = {
        name: folder / name if name != 'README.md' else for_repo(card, repo).encode() for name in FILES}
    sizes = ', '.join(
        f'{name} ({len(file) if isinstance(file, bytes) else file.stat().st_size} bytes)'
        for name, file in files.items())
    if dry_run:
        _logger.info(f'Not uploaded, as this is a dry run: {sizes} to {repo}.')
    else:
        _logger.info(f'Uploading {sizes} to {repo}.')
        try:
            _upload(files, repo, private)
        except FAILURES as e:
            refused = getattr(getattr(e, 'response', None), 'status_code', None) in (401, 403)
            advice = ' Log in with `hf auth login`, or set HF_TOKEN, as someone who may write there.' if refused else ''
            raise UserError(f'{repo} could not be uploaded. {reason(e)}{advice}') from e
    return f'hf-hub:{repo}'


def check_repo(repo: str) -> None:
    """Check a Hub repo's name.

    Raises:
        UserError: No Hub repo can have it.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise UserError(f'{repo!r} is not the name of a Hub repo; it should look like t2t-timm/t2t_vit_14.in1k.') from e


def default_repo(folder: Path) -> str:
    """Return the Hub repo that `pretrained=True` would load a folder's architecture.tag from.

    Raises:
        UserError: The folder's config names no architecture or no tag.
    """
    config = _read_config(Path(folder) / 'config.json')
    architecture, tag = config.get('architecture'), config.get('pretrained_cfg', {}).get('tag')
    if not architecture or not tag:
        raise UserError(
            f'{folder}/config.json names no architecture and tag, so the repo is not known: give REPO as well.')
    return hub_repo(f'{architecture}.{tag}')


def _read_text(file: Path) -> str:
    try:
        with open(file, encoding='utf-8', newline='') as f:  # as it is, also its line ends
            return f.read()
    except UnicodeDecodeError as e:
        raise UserError(f'{file} is not a text file in UTF-8.') from e


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding='utf-8'))
    except ValueError as e:
        raise UserError(f'{file} is not valid JSON: {e}') from e
    if not isinstance(config, dict) or not isinstance(config.get('pretrained_cfg', {}), dict):
        raise UserError(f'{file} is not a timm config: it should have architecture and pretrained_cfg.')
    return config


def _upload(files: dict[str, Path | bytes], repo: str, private: bool) -> None:
    api = HfApi(library_name='t2t-timm', library_version=__version__)
    url = api.create_repo(repo, private=private or None, exist_ok=True)
    before = api.repo_info(repo).sha
    commit = api.create_commit(
        repo,
        [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in files.items()],
        commit_message='Upload weights, config and card',
    )
    if commit.oid == before:
        _logger.info(f'{url} already holds the same files; nothing has been changed.')
    else:
        _logger.info(f'{url} is now at commit {commit.oid}.')
