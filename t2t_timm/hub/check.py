"""What the Hub holds of the published weights, asked without downloading any."""
import logging
from collections import Counter
from typing import Any

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
from timm.models._hub import HF_SAFE_WEIGHTS_NAME

from ..errors import UserError
from ..weights.download import FAILURES, OFFLINE, reason
from ..weights.manifest import hub_repo, load_manifest
from .push import HUB, check_repo
from .verify import Verdict

_logger = logging.getLogger(__name__)

__all__ = ['compare_with_hub', 'hash_and_size', 'unreachable']


def hash_and_size(repo: str, name: str) -> tuple[str | None, int | None] | None:
    """Ask the Hub for a file with one HEAD request.

    Returns:
        The SHA-256 of a large file, or git's blob hash of a small one, and its bytes; None if there is no such file or
        repo.
    """
    try:
        found = HUB.get_hf_file_metadata(url=hf_hub_url(repo, name))
    except GatedRepoError:
        raise
    except (EntryNotFoundError, RepositoryNotFoundError):
        return None
    return found.etag, found.size


def unreachable(e: BaseException) -> UserError | None:
    """Return the error to raise if a request failed because the Hub did not answer at all."""
    if getattr(e, 'response', None) is not None:
        return None
    if constants.HF_HUB_OFFLINE:
        return UserError(f'{OFFLINE}: unset HF_HUB_OFFLINE to ask the Hub.')
    return UserError(f'The Hub at {constants.ENDPOINT} cannot be reached. {reason(e)}')


def compare_with_hub() -> Verdict:
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
        file = hash_and_size(repo, HF_SAFE_WEIGHTS_NAME)
    except GatedRepoError:
        return 'gated', f'access to {repo} has to be asked for'
    except FAILURES as e:
        if error := unreachable(e):
            raise error from e
        return 'error', f'{repo}: {reason(e)}'
    if file is None:
        return 'missing', f'there is no {repo}/{HF_SAFE_WEIGHTS_NAME}, or it is private'
    if not known:
        return 'unknown', f'{repo} is there; this version of t2t-timm knows no hash to compare with'
    sha256, size = file
    if len(sha256 or '') != 64:
        return 'unknown', f'{repo} is there; {constants.ENDPOINT} gives no SHA-256 to compare'
    if (sha256, size) != (known['sha256'], known['size']):
        return 'stale', f'{repo} has sha256 {sha256}, {size} bytes; the manifest has {known["sha256"]}'
    return 'equal', repo
