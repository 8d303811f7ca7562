"""Where pretrained weights come from: the package, the Hub, the publisher's release; always checked before use."""
import hashlib
import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_session, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, get_cache_dir

from _t2t_timm_autoload import is_off

from ..errors import UserError, file_reason
from ..version import __version__
from .checkpoint import load_file
from .manifest import Published, hub_repo, weight_entry, weights_repo

_logger = logging.getLogger(__name__)

__all__ = [
    'DownloadError', 'FAILURES', 'IntegrityError', 'OFFLINE', 'check_file', 'file_hash', 'pretrained_file', 'reason',
    'release_file', 'retrying',
]

OFFLINE = 'Offline mode is on (HF_HUB_OFFLINE=1)'
PART = '.incomplete'  # end of the name of a file that is being downloaded
RETRY_WAITS = (1, 4)  # seconds between attempts, beyond what huggingface_hub repeats by itself
_UNREACHABLE = ('ConnectError', 'ConnectTimeout')  # names, as the HTTP client has changed twice
# Base class of the errors of huggingface_hub's HTTP client.
_HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
# A download or an upload may raise any of these.
FAILURES: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, _HTTPError)


class DownloadError(UserError):
    """Weights could not be fetched."""


class IntegrityError(UserError):
    """A file is not the one that the manifest describes."""


def pretrained_file(name: str, cache_dir: str | Path | None = None) -> Path:
    """Return the local file of an architecture.tag's weights, downloaded if necessary and checked.

    A file inside the package is taken from there. Others come from the publisher's release, which T2T_TIMM_HUB_ONLY=1
    forbids. The Hub repo `<namespace>/<architecture>.<tag>` is asked first if the manifest knows the hash of its
    weights, or if T2T_TIMM_HUB_NAMESPACE names a namespace; the release is taken only if there is no such repo.

    Downloads are kept in `cache_dir`, by default the Hub's cache and torch.hub's checkpoints folder.

    Raises:
        KeyError: No such weights.
        DownloadError: They could not be fetched.
        IntegrityError: They are not what the manifest describes; they have been deleted.
    """
    entry = weight_entry(name)
    try:
        return _find_file(name, entry, cache_dir)
    except DownloadError as e:
        raise DownloadError(  # alone, else Python shows each library's own error
            f'{name} could not be downloaded. What you can do: (1) download {entry.url} where you have access and copy '
            f'it to {release_path(entry, cache_dir)}, or copy the cache of a machine that has the Hub repo (hub under '
            f'HF_HOME); (2) convert a file that you have with `t2t-timm convert FILE --model {name} --out DIR` and '
            'load local-dir:DIR; (3) name another Hub user or organization that has the repo with '
            f'T2T_TIMM_HUB_NAMESPACE. What happened: {e}') from None
    except OSError as e:
        if e.filename is None:
            raise
        raise DownloadError(f'{name} cannot be kept: {file_reason(e)}.') from None


def _find_file(name: str, entry: Published, cache_dir: str | Path | None) -> Path:
    if entry.path:
        _logger.info(f'{name}: in the package, {entry.file}.')
        check_file(entry.path, entry.facts, name)
        return Path(entry.path)
    repo, hub_only = weights_repo(name), is_set('T2T_TIMM_HUB_ONLY')
    downloaded = not hub_only and release_path(entry, cache_dir).is_file()
    if repo is None and hub_only:
        raise DownloadError(
            f"T2T_TIMM_HUB_ONLY forbids the publisher's release, and {hub_repo(name)} is not asked, as the manifest "
            'knows no hash of its weights.')
    if repo is None and constants.HF_HUB_OFFLINE and not downloaded:
        raise DownloadError(f'{OFFLINE}, and the file is not in the cache.')
    if repo is None:
        return release_file(name, cache_dir)
    _logger.info(f'{name}: asking the Hub for {repo}.')
    try:
        return _hub_file(name, repo, entry.hub, cache_dir)
    except RepositoryNotFoundError as e:
        if hub_only:
            raise DownloadError(
                f"There is no Hub repo {repo}, and T2T_TIMM_HUB_ONLY forbids the publisher's release.") from e
        _logger.warning(f'{name}: there is no Hub repo {repo}; taking the release of its publisher, {entry.url}.')
    except LocalEntryNotFoundError as e:
        why = OFFLINE if constants.HF_HUB_OFFLINE else f'The Hub could not be reached for {repo}'
        if not downloaded:
            more = '' if constants.HF_HUB_OFFLINE else f' {reason(e.__cause__ or e)}'
            raise DownloadError(f'{why}, and the file is not in the cache.{more}') from e
        _logger.warning(f'{name}: {why}; using the release downloaded before.')
    return release_file(name, cache_dir)


def check_file(file: str | Path, known: dict[str, Any], name: str) -> bool:
    """Compare a file with what the manifest knows of it, and return whether a hash, or a part of one, was among that.

    An IntegrityError, which calls the file `name`, says if it differs.
    """
    size, file_name = os.path.getsize(file), os.path.basename(file).removesuffix(PART)
    checked = [key for key in ('size', 'sha256', 'sha384', 'sha256_prefix') if key in known]
    for key in checked:
        expected = str(known[key]).lower()
        value = str(size) if key == 'size' else file_hash(file, key.removesuffix('_prefix'))[:len(expected)]
        if value != expected:
            raise IntegrityError(f'{name}: the {key} of {file_name} should be {expected} but is {value}.')
    has_hash = bool(set(checked) - {'size'})
    if has_hash:
        _logger.info(f'{name}: verified ({", ".join(checked)}).')
    else:
        _logger.warning(f'{name}: unverified, as the manifest has no hash of {file_name} ({size} bytes).')
    return has_hash


def file_hash(file: str | Path, algorithm: str = 'sha256') -> str:
    """Return the hex digest of a file."""
    digest = hashlib.new(algorithm)
    with open(file, 'rb') as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _hub_file(name: str, repo: str, known: dict[str, Any], cache_dir: str | Path | None) -> Path:
    error = None if constants.HF_HUB_OFFLINE else _connection_error(constants.ENDPOINT)
    download = partial(
        hf_hub_download, repo, HF_SAFE_WEIGHTS_NAME, cache_dir=cache_dir, local_files_only=error is not None,
        library_name='t2t-timm', library_version=__version__)
    try:
        file = retrying(download, name)
    except FAILURES as e:
        if isinstance(e, (RepositoryNotFoundError, LocalEntryNotFoundError)) and not isinstance(e, GatedRepoError):
            raise e from error or e.__cause__
        raise DownloadError(f'Downloading {repo} from the Hub failed. {reason(e)}') from e
    blob = os.path.basename(os.path.realpath(file))
    if len(blob) == 64 and 'sha256' not in known:  # The cache names a large file by the SHA-256 that the Hub gave.
        _logger.warning(f"{name}: unverified, as the manifest has no hash of {repo}; comparing with the Hub's own.")
        known = dict(known, sha256=blob)
    _check_download(file, known, name)
    return Path(file)


def release_file(name: str, cache_dir: str | Path | None = None) -> Path:
    """Return the local file of the publisher's release of an architecture.tag, as `pretrained_file`."""
    entry = weight_entry(name)
    file = release_path(entry, cache_dir)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(file.with_name(f'.{file.name}.lock')):
            if not file.is_file():  # Another process may have been here first.
                part = file.with_name(file.name + PART)
                try:
                    retrying(partial(_download_release, entry, part), name)
                except FAILURES as e:
                    raise DownloadError(f'Downloading {entry.url} failed. {reason(e)}') from e
                _check_download(part, entry.facts, name, is_new=True)
                os.replace(part, file)
                return file
    _logger.info(f'{name}: downloaded before, {file}.')
    _check_download(file, entry.facts, name)
    return file


def _download_release(entry: Published, part: Path) -> None:
    assert entry.url is not None  # what has no path has a url
    if error := _connection_error(entry.url):
        raise error
    # Resume what an earlier run left only if a hash can tell whether beginning and end belong together.
    with open(part, 'ab' if entry.facts.keys() - {'size'} else 'wb') as f:
        try:
            http_get(entry.url, f, resume_size=f.tell(), expected_size=entry.size, displayed_filename=entry.file)
        except HfHubHTTPError as e:
            if e.response.status_code == 416:  # the beginning is longer than the file
                f.truncate(0)
            raise


def release_path(entry: Published, cache_dir: str | Path | None) -> Path:
    return Path(cache_dir or get_cache_dir()).expanduser() / entry.file


def _check_download(file: str | Path, known: dict[str, Any], name: str, is_new: bool = False) -> None:
    try:
        if not check_file(file, known, name) and is_new:
            load_file(Path(file))  # only reading it tells a gateway's own page or a file without its end
    except UserError as e:
        Path(file).resolve().unlink(missing_ok=True)  # a Hub cache holds links to files
        Path(file).unlink(missing_ok=True)
        text = str(e).replace(PART, '').rstrip('.')
        raise IntegrityError(
            f'{text if isinstance(e, IntegrityError) else f"{name}: {text}"}. The file has been deleted and nothing '
            'was loaded from it.') from None


def _connection_error(url: str) -> Exception | None:
    # Asked once, before huggingface_hub asks: without a network that tries for 20 seconds, with a warning each time.
    try:
        get_session().head(url, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
    except FAILURES as e:
        return e if type(e).__name__ in _UNREACHABLE else None
    return None


def retrying(download: Callable[[], Any], name: str) -> Any:
    """Return what a download returns, tried again after a failure that may pass."""
    for wait in RETRY_WAITS:
        try:
            return download()
        except FAILURES as e:
            if not _may_pass(e):
                raise
            _logger.warning(f'{name}: {reason(e)} Trying again in {wait} s.')
            time.sleep(wait)
    return download()


def _may_pass(e: BaseException) -> bool:
    # Tell whether the same request may succeed later. huggingface_hub has repeated what LocalEntryNotFound reports.
    status = getattr(getattr(e, 'response', None), 'status_code', None)
    if status is not None:
        return status in (408, 416, 429) or status >= 500
    if isinstance(e, LocalEntryNotFoundError) or type(e).__name__ in _UNREACHABLE:
        return False
    return isinstance(e, _HTTPError) or isinstance(e, OSError) and e.errno is None


def reason(e: BaseException) -> str:
    """Return what an error says, as a sentence on one line."""
    lines = [line for line in str(e).splitlines() if not line.startswith('For more information check')]
    text = ' '.join(f'{type(e).__name__}: {" ".join(lines)}'.split())
    return text if text.endswith('.') else f'{text.rstrip(":")}.'


def is_set(variable: str) -> bool:
    return bool(os.environ.get(variable)) and not is_off(variable)
