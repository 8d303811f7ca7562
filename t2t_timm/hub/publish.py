"""Publishing: from the publishers' releases to Hub repos that `pretrained=True` loads, and to the manifest's lines."""
import difflib
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import timm
from huggingface_hub import HfApi, get_token, hf_hub_download
from huggingface_hub.utils import WeakFileLock
from huggingface_hub.utils.sha import git_hash
from safetensors import SafetensorError
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, get_cache_dir

from ..errors import UserError, suggestion
from ..files import new_file
from ..models import T2TViT
from ..version import __version__
from ..weights.download import FAILURES, file_hash, reason, release_file, retrying
from ..weights.manifest import MANIFEST, hub_repo, load_manifest, weight_entry
from .cards import for_repo
from .check import HubFile, hub_file, unreachable
from .convert import convert, write_config_and_card
from .hub_lines import known_hub_lines, with_hub_lines
from .push import FILES, check_repo, push
from .verify import verify

_logger = logging.getLogger(__name__)

__all__ = ['Published', 'publish']

_FAILURES: tuple[type[Exception], ...] = (*FAILURES, SafetensorError)
_LOG_IN = 'log in with `hf auth login`, or set HF_TOKEN, as someone who may write there.'


class Published(NamedTuple):
    """What came of publishing."""
    patch: str  # unified diff that puts the hashes and sizes of what is on the Hub now into the manifest
    failed: dict[str, str]  # architecture.tag: why


class _Options(NamedTuple):
    namespace: str | None
    source: Path | None
    private: bool
    dry_run: bool


def publish(
        tags: Sequence[str] = (),
        namespace: str | None = None,
        source: Path | None = None,
        manifest: Path | None = None,
        private: bool = False,
        dry_run: bool = False,
) -> Published:
    """Fetch, convert, verify and upload published weights, one Hub repo per tag, and read each back from the Hub.

    A tag whose repo holds the files that the manifest and the code describe is skipped. A tag that fails does not stop
    the others. After a kill, the same call goes on: downloads, uploaded files and lines of `manifest` are kept.

    Args:
        tags: architecture.tag names, by default all that have a release.
        namespace: Hub user or organization, by default T2T_TIMM_HUB_NAMESPACE or the project's.
        source: Folder with the publishers' files, to take them from instead of downloading them.
        manifest: Manifest to write each tag's `hub:` lines into, once it has been read back; there is no patch then.
        private: Make repos private that are created.
        dry_run: Fetch, convert and verify; ask the Hub nothing and send nothing.

    Raises:
        UserError: A tag, the namespace, the folder or the manifest is wrong, nobody is logged in, or the Hub cannot be
            reached; nothing has been done.
    """
    names = _names(tags)
    for name in names:
        check_repo(hub_repo(name, namespace))
    file = Path(manifest or MANIFEST).resolve()
    if not file.is_file():
        raise UserError(f'There is no manifest {file}.')
    known = known_hub_lines(_read(file), names, file)
    if source is not None and not Path(source).is_dir():
        raise UserError(f'There is no folder {source} to take the files from.')
    if not dry_run:
        _check_login(hub_repo(names[0], namespace))
    return _publish_each(known, file, manifest is not None, _Options(namespace, source, private, dry_run))


def _publish_each(known: dict[str, dict[str, Any]], file: Path, write: bool, options: _Options) -> Published:
    before = text = _read(file)
    outcomes: Counter[str] = Counter()
    failed: dict[str, str] = {}
    with _work_folder() as work:
        for number, name in enumerate(known, 1):
            _logger.info(f'[{number} of {len(known)}] {name}')
            folder = work / name
            try:
                folder.mkdir()
                outcome, lines = _publish_tag(name, known[name], folder, options)
                if lines is not None:
                    text = with_hub_lines(_read(file) if write else text, name, lines)
                    if write:
                        _write(file, text)
            except _FAILURES as e:
                outcome = 'failed'
                failed[name] = str(e).removeprefix(f'{name}: ') if isinstance(e, UserError) else reason(e)
                _logger.warning(f'Failed: {failed[name]}')
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            outcomes[outcome] += 1
    _logger.info(_summary(outcomes, failed))
    return Published('' if write else _diff(before, text), failed)


def _names(tags: Sequence[str]) -> list[str]:
    released = [name for name, entry in load_manifest()['weights'].items() if entry.url]
    wrong = [tag for tag in tags if tag not in released]
    if wrong:
        raise UserError(
            f'No tag with a release is called {", ".join(wrong)}; there are {", ".join(released)}.'
            f'{suggestion(wrong[0], released)}')
    return list(dict.fromkeys(tags)) or released


def _check_login(repo: str) -> None:
    token = get_token()
    where = f'Publishing to {repo.split("/")[0]} needs a Hub token: '
    if not token:
        raise UserError(where + _LOG_IN)
    if not (token.isascii() and token.isprintable()):  # an HTTP library would print it in its complaint
        raise UserError(f'{where}the one set holds characters that no token has; {_LOG_IN}')
    try:
        HfApi(library_name='t2t-timm', library_version=__version__).whoami()
    except FAILURES as e:
        error = unreachable(e)
        if error is not None:
            raise error from e
        # another answer is no refusal: a server of one's own need not know the question
        if getattr(getattr(e, 'response', None), 'status_code', None) in (401, 403):
            raise UserError(f'{where}the one set is not accepted; {_LOG_IN}') from e


@contextmanager
def _work_folder() -> Iterator[Path]:
    # always the same, so that what a killed run has left is removed by the next; beside the downloads, where there is
    # room for them
    folder = Path(get_cache_dir()) / 't2t-timm-publish'
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(folder.with_name(f'.{folder.name}.lock'), timeout=1))
        except TimeoutError as e:
            raise UserError(f'Another `t2t-timm publish` is at work in {folder}; wait until it has ended.') from e
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield folder


def _publish_tag(
        name: str,
        known: dict[str, Any],
        folder: Path,
        options: _Options,
) -> tuple[str, dict[str, Any] | None]:
    """Return what was done, and the lines for the manifest if it was published."""
    repo = hub_repo(name, options.namespace)
    if not options.dry_run and _is_there(name, repo, known, folder):
        _logger.info(f'{repo} is there already and equal.')
        return 'already there', None
    file = release_file(name) if options.source is None else _given_file(name, options.source)
    converted = convert(file, name, folder / 'converted', checked=options.source is None)
    _name_repo(converted, repo)
    verdict = verify(str(file), str(converted), name)
    if not verdict.good:
        why = next((line.strip() for line in verdict.lines if 'loads strictly: no' in line), verdict.lines[-1])
        raise UserError(f'{file} and what it was converted to do not agree: {why}')
    _logger.info(f'Both load strictly; {verdict.lines[-1]}.')
    weights = converted / HF_SAFE_WEIGHTS_NAME
    lines = {'sha256': file_hash(weights), 'size': weights.stat().st_size}
    if known and known != lines:
        _logger.warning(
            f'{name}: the manifest expects other weights in {repo} (sha256 {known.get("sha256")}): a t2t-timm that was '
            'installed with it will refuse these.')
    push(converted, repo, private=options.private, dry_run=options.dry_run)
    if options.dry_run:
        return 'checked, not sent', None
    _read_back(name, repo, converted, folder)
    return 'published', lines


def _given_file(name: str, source: Path) -> Path:
    file = Path(source) / weight_entry(name).file
    if not file.is_file():
        raise UserError(f'{source} does not hold {file.name}, which is at {weight_entry(name).url}.')
    return file


def _is_there(name: str, repo: str, known: dict[str, Any], folder: Path) -> bool:
    """Return whether a repo has the weights that the manifest knows, and the config and card of today."""
    if not {'sha256', 'size'} <= set(known) or (
            hub_file(repo, HF_SAFE_WEIGHTS_NAME) != HubFile(known['sha256'], known['size'])):
        return False
    write_config_and_card(folder, cast(T2TViT, timm.create_model(name, device='meta')))
    _name_repo(folder, repo)
    small = ((file, (folder / file).read_bytes()) for file in FILES if file != HF_SAFE_WEIGHTS_NAME)
    return all(hub_file(repo, file) == HubFile(git_hash(data), len(data)) for file, data in small)


def _name_repo(folder: Path, repo: str) -> None:
    card = folder / 'README.md'  # as push uploads it
    card.write_text(for_repo(card.read_text(encoding='utf-8'), repo), encoding='utf-8', newline='\n')


def _read_back(name: str, repo: str, converted: Path, folder: Path) -> None:
    for file in FILES:
        def download(file: str = file) -> str:
            return hf_hub_download(
                repo, file, cache_dir=folder / 'read-back', library_name='t2t-timm', library_version=__version__)

        try:
            found = file_hash(retrying(download, name))
        except FAILURES as e:
            raise UserError(f'{repo} was uploaded, but {file} could not be read back. {reason(e)}') from e
        sent = file_hash(converted / file)
        if found != sent:
            raise UserError(
                f'{repo} was uploaded, but {file} came back with the sha256 {found} instead of {sent}. '
                'Publish it again; if that does not help, delete the repo first.')
    _logger.info(f'{repo} was read back and is equal.')


def _read(file: Path) -> str:
    with open(file, encoding='utf-8', newline='') as f:
        return f.read()


def _write(file: Path, text: str) -> None:
    with new_file(file) as part, open(part, 'w', encoding='utf-8', newline='') as f:
        f.write(text)


def _summary(outcomes: Counter[str], failed: dict[str, str]) -> str:
    counts = ', '.join(f'{count} {outcome}' for outcome, count in outcomes.items())
    tags = '1 tag' if outcomes.total() == 1 else f'{outcomes.total()} tags'
    return '\n'.join([f'{tags}: {counts}.', *(f'  {name}: {why}' for name, why in failed.items())])


def _diff(before: str, after: str) -> str:
    path = 't2t_timm/weights/manifest.yaml'
    old, new = (text.splitlines(keepends=True) for text in (before, after))
    return ''.join(difflib.unified_diff(old, new, f'a/{path}', f'b/{path}'))
