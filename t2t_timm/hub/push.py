"""What is asked of the Hub: to take a folder of converted weights as a repo, and what it holds."""
import logging
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from timm.models._hub import HF_SAFE_WEIGHTS_NAME

from ..errors import UserError
from ..version import __version__
from ..weights.download import FAILURES, OFFLINE, reason
from ..weights.manifest import ModelName, hub_repo
from ..weights.record import record_of
from .cards import for_repo, places_to_fill_in

_logger = logging.getLogger(__name__)

__all__ = ['FILES', 'HUB', 'LOG_IN', 'check_reached', 'hash_and_size', 'is_refusal', 'push']

HUB = HfApi(library_name='t2t-timm', library_version=__version__)
FILES = (HF_SAFE_WEIGHTS_NAME, 'config.json', 'README.md')  # all of a repo: nothing pickled
LOG_IN = 'Log in with `hf auth login`, or set HF_TOKEN, as someone who may write there.'


def push(
        folder: Path,
        repo: str | None = None,
        private: bool = False,
        dry_run: bool = False,
        force: bool = False,
) -> str:
    """Upload a folder's weights, config and card to the Hub and return the name that timm loads them by.

    The repo is created if there is none. Files that the repo already holds are left alone. The card that is uploaded
    names the repo where the one in the folder says `local-dir:DIR`. The arguments are those of `t2t-timm push`;
    with dry_run nothing is sent.

    Raises:
        UserError: A file is missing, the card has places to fill in, the config names no tag, or the Hub refused.
        HFValidationError: No Hub repo can have that name.
    """
    folder = Path(folder)
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:  # before a REPO is asked for, which does not help if the folder is another one
        raise UserError(f'{folder} has no {", ".join(missing)}: name a folder that `t2t-timm convert` wrote.')
    if not repo:
        name = record_of({}, folder).model
        if not ModelName.parse(name).tag:
            raise UserError(
                f'{folder}/config.json names no architecture and tag, so the repo is not known: give REPO as well.')
        repo = hub_repo(name)
    validate_repo_id(repo)
    try:
        card = (folder / 'README.md').read_bytes().decode()  # as it is, also its line ends
    except UnicodeDecodeError as e:
        raise UserError(f'{folder / "README.md"} is not a text file in UTF-8.') from e
    to_fill_in = places_to_fill_in(card)
    if to_fill_in and not force:
        raise UserError(
            f'{folder / "README.md"} does not say yet: {", ".join(to_fill_in)}. Write it there, or upload the card as '
            'it is with --force.')
    if '/OWNER/' in card:
        _logger.warning('The card does not say yet where t2t-timm is: put its address in the place of OWNER.')
    files = {name: (folder / name).read_bytes() for name in FILES} | {'README.md': for_repo(card, repo).encode()}
    sizes = ', '.join(f'{name} ({len(data)} bytes)' for name, data in files.items())
    if dry_run:
        _logger.info(f'Not uploaded, as this is a dry run: {sizes} to {repo}.')
        return f'hf-hub:{repo}'
    _logger.info(f'Uploading {sizes} to {repo}.')
    try:
        url = HUB.create_repo(repo, private=private or None, exist_ok=True)
        commit = HUB.create_commit(
            repo, [CommitOperationAdd(name, data) for name, data in files.items()],
            commit_message='Upload weights, config and card')
    except FAILURES as e:
        advice = f' {LOG_IN}' if is_refusal(e) else ''
        raise UserError(f'{repo} could not be uploaded. {reason(e)}{advice}') from e
    _logger.info(f'{url} is at commit {commit.oid}.')
    return f'hf-hub:{repo}'


def is_refusal(e: BaseException) -> bool:
    """Return whether an error is the Hub's answer that one may not."""
    return getattr(getattr(e, 'response', None), 'status_code', None) in (401, 403)


def check_reached(e: BaseException) -> None:
    """Raise a UserError if a request failed because the Hub did not answer at all."""
    if constants.HF_HUB_OFFLINE:
        raise UserError(f'{OFFLINE}: unset HF_HUB_OFFLINE to ask the Hub.') from e
    if getattr(e, 'response', None) is None:
        raise UserError(f'The Hub at {constants.ENDPOINT} cannot be reached. {reason(e)}') from e


def hash_and_size(repo: str, name: str) -> tuple[str | None, int | None]:
    """Return the SHA-256 of a large file on the Hub, git's blob hash of a small one, or '', and its bytes.

    One HEAD request asks. Both are None if there is no such file or repo.
    """
    try:
        found = HUB.get_hf_file_metadata(url=hf_hub_url(repo, name))
    except GatedRepoError:
        raise
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None, None
    return found.etag or '', found.size
