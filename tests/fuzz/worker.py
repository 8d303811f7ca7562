"""The process that runs fuzz cases: it receives (CASE, FOLDER) and sends the outcome."""
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import torch

from t2t_timm.commands.val_tree import val_tree
from t2t_timm.errors import UserError, printable
from t2t_timm.hub.convert import convert
from t2t_timm.hub.verify import verify

from . import checkpoints, trees
from .checkpoints import FORMATS, mutated_checkpoint, mutated_config

__all__ = ['Watch', 'call', 'run']

MEMORY = 1 << 30  # bytes that a case may take, in RAM and beyond what the process had
SECONDS = 10  # of computing: how long it waits depends on what else the machine does
SENTENCE = 2000  # characters that a message may have


class Watch:
    """What happens during a case that must not: an audit hook, which cannot be taken off again."""
    _EXECUTES = ('os.system', 'os.exec', 'os.posix_spawn', 'os.spawn', 'os.fork', 'subprocess.Popen', 'ctypes.dlopen')
    _CHANGES = ('os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.symlink', 'os.link', 'os.truncate', 'os.chmod')

    def __init__(self) -> None:
        self.folder, self.seen = None, []
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if self.folder is None:
            return
        if event in self._EXECUTES or event.startswith('socket.'):
            self.seen.append(f'{event} {args!r}'[:200])
        elif event == 'open' and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self._inside(event, args[0])
        elif event in self._CHANGES and args[-1] in (-1, None):  # not relative to an open folder, as rmtree has it
            # the source of a link may be anywhere
            self._inside(event, args[1] if event in ('os.symlink', 'os.rename') else args[0])

    def _inside(self, event: str, path: object) -> None:
        if isinstance(path, (str, bytes)) and not os.path.abspath(os.fsdecode(path)).startswith(self.folder):
            self.seen.append(f'{event} {path!r}')


def _memory(which: str) -> int:
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) * 1024
    raise RuntimeError(which)


def _checkpoint_case(rng: Random, folder: Path) -> list[tuple]:
    """Write a mutated checkpoint; return the calls to make of it."""
    fmt, data = mutated_checkpoint(rng)
    model = rng.choice(('test_t2t_vit', 'test_t2t_vit', 'test_t2t_vit', 'test_t2t_vit.mnist', 't2t_vit_7'))
    file = folder / 'a.pth'
    file.write_bytes(data)
    calls = [(convert, file, model, folder / 'out'), (verify, str(file), None, None)]
    if rng.random() < .3:
        (folder / 'whole.pth').write_bytes(checkpoints.whole_file(fmt))
        calls.append((verify, str(folder / 'whole.pth'), str(file), 'test_t2t_vit'))
    if rng.random() < .2:
        whole = folder / 'whole'
        convert(folder / 'whole.pth', 'test_t2t_vit', whole) if (folder / 'whole.pth').exists() else whole.mkdir()
        if (whole / 'config.json').exists():
            (whole / 'config.json').write_bytes(mutated_config(rng, whole / 'config.json'))
        calls.append((verify, str(whole), None, None))
    return calls


def _tree_case(rng: Random, folder: Path) -> list[tuple]:
    """Write a mutated list, tar or folder; return the calls to make of it."""
    trees.write_originals(folder)
    kind = rng.choice(('list', 'list', 'tar', 'tar', 'tar', 'folder', 'both', 'names'))
    images = folder / ('val.tar' if kind in ('tar', 'both') else 'flat')
    if kind == 'names':
        (folder / 'a.pth').write_bytes(checkpoints.whole_file(rng.choice(list(FORMATS))))
        (folder / 'names.txt').write_bytes(trees.mutated_names(rng, 10))
        return [(convert, folder / 'a.pth', 'test_t2t_vit', folder / 'out', folder / 'names.txt')]
    if kind in ('list', 'both'):
        (folder / 'val.txt').write_bytes(trees.mutated_list(rng))
    if kind in ('tar', 'both'):
        images.write_bytes(trees.mutated_tar(rng))
    if kind == 'folder':
        trees.mutate_folder(rng, images)
    calls = [(val_tree, images, folder / 'val.txt', folder / 'out')]
    if rng.random() < .2:  # the tree that is there again, which is foreign too
        calls.append(calls[0])
    return calls


def _everything(folder: Path) -> set[str]:
    return {os.path.join(root, name) for root, dirs, files in os.walk(folder) for name in dirs + files}


def call(watch: Watch, folder: Path, function: object, *args: object) -> tuple[str, list[str]]:
    """Make one call; return how it ended and what was wrong with it."""
    before, found = _everything(folder), []
    try:
        result = function(*args)
        how = 'success'
        found += [f'prints {line!r}' for line in getattr(result, 'lines', ()) if line != printable(line)]
    except UserError as e:
        how = 'a sentence'
        text = str(e)
        if len(text) > SENTENCE or text != printable(text) or not text.strip():
            found.append(f'no message of one line: {text[:300]!r} ({len(text)} characters)')
        found += [f'left behind {path}' for path in sorted(_everything(folder) - before)[:3]]
    except BaseException as e:
        how = 'an exception'
        frames = ' < '.join(
            f'{Path(f.filename).name}:{f.lineno}' for f in reversed(traceback.extract_tb(e.__traceback__)))
        found.append(f'{type(e).__name__}: {str(e)[:200]!r} at {frames[:300]}')
    left = _everything(folder) - before
    found += [f'left a part of a file, {path}' for path in left if '.part' in path or '/.out' in path]
    found += [f'happened: {what}' for what in watch.seen]
    watch.seen.clear()
    return how, [f'{function.__name__}: {what}' for what in found]


def run(watch: Watch, case: str, folder: Path) -> dict:
    """Run a case; the outcome says how its first call ended, and its finding, if any."""
    kind, _, seed = case.partition(':')
    rng = Random(case)
    temporary = folder / 'tmp'
    temporary.mkdir()
    calls = {'checkpoint': _checkpoint_case, 'tree': _tree_case}[kind](rng, folder)
    Path('/proc/self/clear_refs').write_text('5')  # the highest use of RAM counts from here
    before, start = _memory('VmRSS'), time.process_time()
    watch.folder, tempfile.tempdir = str(folder), str(temporary)
    try:
        ends = [call(watch, folder, *each) for each in calls]
    finally:
        watch.folder = tempfile.tempdir = None
    taken, seconds = _memory('VmHWM') - before, time.process_time() - start
    found = [what for _, problems in ends for what in problems]
    found += [f'took {taken >> 20} MiB'] * (taken > MEMORY)
    found += [f'took {seconds:.1f} s'] * (seconds > SECONDS)
    found += [f'left in the folder of temporary files: {path.name}' for path in temporary.iterdir()]
    return dict(how=ends[0][0], seconds=seconds, mib=taken >> 20, **({'finding': '; '.join(found)} if found else {}))


def main(connection: Connection) -> None:
    """Serve cases until the process is killed."""
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:  # what is imported and cached at first use is not a case's
        checkpoint = Path(tmp, 'a.pth')
        checkpoint.write_bytes(checkpoints.whole_file('PyTorch'))
        convert(checkpoint, 'test_t2t_vit', Path(tmp, 'out'))
        verify(str(checkpoint), str(Path(tmp, 'out')))
    limit = _memory('VmSize') + 3 * MEMORY  # a net for the machine; what counts is measured
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    watch = Watch()
    connection.send('ready')
    while True:
        connection.send(run(watch, *connection.recv()))
