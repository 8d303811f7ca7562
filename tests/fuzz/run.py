"""Fuzzing of what reads foreign bytes, `make fuzz`: mutated files through convert, verify and val-tree.

    cd tests && python -m fuzz.run [--cases N] [--seed FIRST]           all cases of so many seeds
    cd tests && python -m fuzz.run --only checkpoint:17 --keep DIR      one again, its files kept

Each case runs in a forked process, and must end within 10 s and 1 GiB in success or in a UserError of one sentence,
start no process, open no connection, write nothing outside its folder, and leave nothing there after a failure.
"""
import argparse
import gc
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import torch
from huggingface_hub.utils import tqdm

from t2t_timm.commands.val_tree import val_tree
from t2t_timm.errors import UserError, printable
from t2t_timm.hub.convert import convert
from t2t_timm.hub.verify import verify

from . import trees
from .checkpoints import FORMATS, mutated_checkpoint, mutated_config, whole_file

MEMORY = 1 << 30  # bytes that a case may take, in RAM and beyond what the process had
SECONDS = 10  # of computing: how long it waits depends on what else the machine does
WAIT = 60  # seconds for all of a case, its mutation and waiting too
SENTENCE = 2000  # characters that a message may have

_EXECUTES = ('os.system', 'os.exec', 'os.posix_spawn', 'os.spawn', 'os.fork', 'subprocess.Popen', 'ctypes.dlopen')
_CHANGES = ('os.mkdir', 'os.rename', 'os.remove', 'os.rmdir', 'os.symlink', 'os.link', 'os.truncate', 'os.chmod')


def _checkpoint_case(rng: Random, folder: Path) -> list[tuple]:
    """Write a mutated checkpoint; return the calls to make of it."""
    fmt, data = mutated_checkpoint(rng)
    model = rng.choice(('test_t2t_vit', 'test_t2t_vit', 'test_t2t_vit', 'test_t2t_vit.mnist', 't2t_vit_7'))
    file = folder / 'a.pth'
    file.write_bytes(data)
    calls = [(convert, file, model, folder / 'out'), (verify, str(file), None, None)]
    if rng.random() < .3:
        (folder / 'whole.pth').write_bytes(whole_file(fmt))
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
        (folder / 'a.pth').write_bytes(whole_file(rng.choice(list(FORMATS))))
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


CASES = {'checkpoint': _checkpoint_case, 'tree': _tree_case}


def _watch(folder: Path) -> list[str]:
    """Return a list to which this process adds, from now on, what it does that it must not."""
    seen = []

    def hook(event: str, args: tuple) -> None:
        path = None
        if event in _EXECUTES or event.startswith('socket.'):
            seen.append(f'{event} {args!r}'[:200])
        elif event == 'open' and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            path = args[0]
        elif event in _CHANGES and args[-1] in (-1, None):  # not relative to an open folder, as rmtree has it
            path = args[1 if event in ('os.symlink', 'os.rename') else 0]  # the source of a link may be anywhere
        if isinstance(path, (str, bytes)) and not os.path.abspath(os.fsdecode(path)).startswith(str(folder)):
            seen.append(f'{event} {path!r}')
    sys.addaudithook(hook)
    return seen


def _memory(which: str) -> int:
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def _everything(folder: Path) -> set[str]:
    return {os.path.join(root, name) for root, dirs, files in os.walk(folder) for name in dirs + files}


def _call(seen: list[str], folder: Path, function: object, *args: object) -> tuple[str, list[str]]:
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
    found += [f'happened: {what}' for what in seen]
    seen.clear()
    return how, [f'{function.__name__}: {what}' for what in found]


def _run(case: str, folder: Path, connection: Connection) -> None:
    """Run a case in this process, and send how its first call ended and all that was wrong."""
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    limit = _memory('VmSize') + 3 * MEMORY  # a net for the machine; what counts is measured
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    temporary = folder / 'tmp'
    temporary.mkdir()
    calls = CASES[case.partition(':')[0]](Random(case), folder)
    Path('/proc/self/clear_refs').write_text('5')  # the highest use of RAM counts from here
    before, start = _memory('VmRSS'), time.process_time()
    tempfile.tempdir, seen = str(temporary), _watch(folder)
    ends = [_call(seen, folder, *each) for each in calls]
    taken, seconds = _memory('VmHWM') - before, time.process_time() - start
    found = sum((problems for _, problems in ends), [])
    found += [f'took {taken >> 20} MiB'] * (taken > MEMORY)
    found += [f'took {seconds:.1f} s'] * (seconds > SECONDS)
    found += [f'left in the folder of temporary files: {path.name}' for path in temporary.iterdir()]
    connection.send((ends[0][0], found))


def _run_forked(case: str, folder: Path) -> tuple[str, list[str]]:
    """Run a case in an empty folder and a process of its own; return how it ended and what was wrong."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context('fork').Process(target=_run, args=(case, folder, theirs))
    process.start()
    theirs.close()  # so that the end of the process is noticed
    try:
        if ours.poll(WAIT):
            return ours.recv()
        return 'killed', [f'longer than {WAIT} s']
    except EOFError:
        process.join()
        return 'killed', [f'killed the process, exit code {process.exitcode}']
    finally:
        process.kill()
        process.join()


@cache
def _warm_up() -> None:
    """Import and cache what is not a case's: all files before their mutation, and what a first use imports."""
    for fmt in FORMATS:
        whole_file(fmt)
    with tempfile.TemporaryDirectory() as tmp:
        file = Path(tmp, 'a.pth')
        file.write_bytes(whole_file('PyTorch'))
        verify(str(file), str(convert(file, 'test_t2t_vit', Path(tmp, 'out'))))
    gc.freeze()  # a forked process that looked for garbage here would copy all of it


def fuzz(cases: list[str], keep: Path | None = None) -> tuple[Counter, dict[str, str]]:
    """Run cases such as 'checkpoint:17'; return how many ended how, and the findings; keep the files of those."""
    outcomes, findings = Counter(), {}
    _warm_up()
    for case in tqdm(cases, unit='case', delay=1, disable=None):
        with tempfile.TemporaryDirectory(prefix='fuzz-') as tmp:
            how, found = _run_forked(case, Path(tmp))
            outcomes[f'{case.partition(":")[0]}: {how}'] += 1
            if found:
                findings[case] = '; '.join(found)
                tqdm.write(f'{case}: {findings[case]}', file=sys.stderr)
            if keep is not None and (found or len(cases) == 1):
                shutil.copytree(tmp, keep / case.replace(':', '-'), symlinks=True, dirs_exist_ok=True)
    return outcomes, findings


def main(argv: list[str] | None = None) -> int:
    """Run the cases that the arguments name, and print how they ended; exit code 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--cases', type=int, default=2000, metavar='N', help='of each kind (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='the first (default: %(default)s)')
    parser.add_argument('--only', nargs='+', metavar='KIND:SEED', help='these cases and no others')
    parser.add_argument('--keep', type=Path, metavar='DIR', help='keep the files of findings there')
    args = parser.parse_args(argv)
    cases = args.only or [f'{kind}:{args.seed + i}' for kind in CASES for i in range(args.cases)]
    start = time.monotonic()
    outcomes, findings = fuzz(cases, args.keep)
    for how, count in sorted(outcomes.items()):
        print(f'{count:6,}  {how}')
    for case, what in findings.items():
        print(f'{case}: {what}')
    print(f'{len(cases):,} cases in {time.monotonic() - start:.0f} s, {len(findings):,} findings.')
    return 1 if findings else 0


if __name__ == '__main__':
    sys.exit(main())
