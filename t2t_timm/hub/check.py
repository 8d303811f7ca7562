"""What the Hub holds of the published weights, asked without downloading any."""
import logging
from collections import Counter
from typing import Any, NamedTuple

from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
from timm.models._hub import HF_SAFE_WEIGHTS_NAME

from ..errors import UserError
from ..version import __version__
from ..weights.download import FAILURES, OFFLINE, reason
from ..weights.manifest import hub_repo, load_manifest
from .push import check_repo
from .verify import Verdict

_logger = logging.getLogger(__name__)

__all__ = ['HubFile', 'check_hub', 'hub_file', 'unreachable']


class HubFile(NamedTuple):
    """What the Hub says of a file."""
    hash: str | None  # SHA-256 of a large file, git's blob hash of a small one
    size: int | None  # bytes


def hub_file(repo: str, name: str) -> HubFile | None:
    """Return what the Hub says of a repo's file, in one HEAD request; None if there is no such file or repo."""
    try:
        found = HfApi(library_name='t2t-timm', library_version=__version__).get_hf_file_metadata(
            url=hf_hub_url(repo, name))
    except GatedRepoError:
        raise
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None
    return HubFile(found.etag, found.size)


def unreachable(e: BaseException) -> UserError | None:
    """Return the error to raise if a request failed because the Hub did not answer at all."""
    if getattr(e, 'response', None) is not None:
        return None
    if constants.HF_HUB_OFFLINE:
        return UserError(f'{OFFLINE}: unset HF_HUB_OFFLINE to ask the Hub.')
    return UserError(f'The Hub at {constants.ENDPOINT} cannot be reached. {reason(e)}')


def check_hub() -> Verdict:
    """Compare the Hub's weights with the manifest, one HEAD request per tag that has a release.

    Good if every tag's weights are there and equal to what the manifest knows of them.

    Raises:
        UserError: The Hub cannot be reached, or no Hub user or organization can have the name of the namespace.
    """
    tags = {name: entry for name, entry in load_manifest()['weights'].items() if entry.url}
    check_repo(hub_repo(next(iter(tags))))
    _logger.info(f'Asking {constants.ENDPOINT} for {len(tags)} repos.')
    found = {name: _compare(hub_repo(name), entry.hub) for name, entry in tags.items()}
    width = max(map(len, tags))
    lines = [f'{name:{width}}  {state:7}  {words}' for name, (state, words) in found.items()]
    counts = Counter(state for state, _ in found.values())
    lines.append(f'{len(tags)} tags: {", ".join(f"{count} {state}" for state, count in counts.items())}')
    return Verdict(lines, set(counts) == {'equal'})


def _compare(repo: str, known: dict[str, Any]) -> tuple[str, str]:
    try:
        file = hub_file(repo, HF_SAFE_WEIGHTS_NAME)
    except GatedRepoError:
        return 'gated', f'access to {repo} has to be asked for'
    except FAILURES as e:
        error = unreachable(e)
        if error is not None:
            raise error from e
        return 'error', f'{repo}: {reason(e)}'
    if file is None:
        return 'missing', f'there is no {repo}/{HF_SAFE_WEIGHTS_NAME}, or it is private'
    if 'sha256' not in known:
        return 'unknown', f'{repo} is there; this version of t2t-timm knows no hash to compare with'
    if len(file.hash or '') != 64:
        return 'unknown', f'{repo} is there; {constants.ENDPOINT} gives no SHA-256 to compare'
    if (file.hash, file.size) != (known['sha256'], known.get('size', file.size)):
        return 'stale', f'{repo} has sha256 {file.hash}, {file.size} bytes; the manifest has {known["sha256"]}'
    return 'equal', repo
