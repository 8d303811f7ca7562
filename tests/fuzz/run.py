"""Fuzzing of what reads foreign bytes, `make fuzz`: mutated files through convert, verify and val-tree.

    cd tests && python -m fuzz.run [--checkpoints N] [--trees N] [--seed FIRST]     all cases of so many seeds
    cd tests && python -m fuzz.run --only checkpoint:17 --keep DIR                  one again, its files kept

Each case runs in a worker process, and must end within 10 s and 1 GiB in success or in a UserError of one sentence,
start no process, open no connection, write nothing outside its folder, and leave nothing there after a failure.
"""
import argparse
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import warm
from huggingface_hub.utils import tqdm

__all__ = ['SECONDS', 'Worker', 'fuzz', 'main']

SECONDS = 60  # for all of a case, its mutation and waiting too; the worker holds the calls themselves to 10


class Worker:
    """A process that runs cases, one at a time; started again when one has killed it."""

    def __init__(self) -> None:
        self.process = None

    def run(self, case: str, folder: Path) -> dict:
        """Run a case in an empty folder; return its outcome, with 'finding' in it if something is wrong."""
        if self.process is None:
            self._start()
        self.connection.send((case, folder))
        try:
            if self.connection.poll(SECONDS):
                return self.connection.recv()
            why = f'longer than {SECONDS} s'
        except (EOFError, ConnectionError):
            self.process.join()
            why = f'killed the process, exit code {self.process.exitcode}'
        self.close()
        return dict(finding=why, how='killed')

    def _start(self) -> None:
        self.connection, theirs = warm.CONTEXT.Pipe()
        self.process = warm.start(
            'fuzz.worker', dict(os.environ, OMP_NUM_THREADS='1', HF_HUB_OFFLINE='1'), theirs)
        theirs.close()  # so that the end of the process is noticed
        try:
            assert self.connection.poll(120) and self.connection.recv() == 'ready'
        except (AssertionError, EOFError, ConnectionError) as e:
            self.close()
            raise RuntimeError('The worker did not start.') from e

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.connection.close()
            self.process = None


def fuzz(cases: list[str], keep: Path | None = None) -> tuple[Counter, dict[str, str]]:
    """Run cases such as 'checkpoint:17'; return how many ended how, and the findings.

    Args:
        cases: What each is made of: its kind and its seed.
        keep: Folder to keep the files of findings in.
    """
    worker, outcomes, findings = Worker(), Counter(), {}
    try:
        for case in tqdm(cases, unit='case', delay=1, disable=None):
            with tempfile.TemporaryDirectory(prefix='fuzz-') as tmp:
                outcome = worker.run(case, Path(tmp))
                outcomes[f'{case.partition(":")[0]}: {outcome["how"]}'] += 1
                if 'finding' in outcome:
                    findings[case] = outcome['finding']
                    tqdm.write(f'{case}: {outcome["finding"]}', file=sys.stderr)
                if keep is not None and ('finding' in outcome or len(cases) == 1):
                    shutil.copytree(tmp, keep / case.replace(':', '-'), symlinks=True, dirs_exist_ok=True)
    finally:
        worker.close()
    return outcomes, findings


def main(argv: list[str] | None = None) -> int:
    """Run the cases that the arguments name, and print how they ended; exit code 1 if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--checkpoints', type=int, default=2000, metavar='N', help='default: %(default)s')
    parser.add_argument('--trees', type=int, default=2000, metavar='N', help='default: %(default)s')
    parser.add_argument('--seed', type=int, default=0, help='the first (default: %(default)s)')
    parser.add_argument('--only', nargs='+', metavar='KIND:SEED', help='these cases and no others')
    parser.add_argument('--keep', type=Path, metavar='DIR', help='keep the files of findings there')
    args = parser.parse_args(argv)
    cases = args.only or [
        f'{kind}:{seed}' for kind, count in (('checkpoint', args.checkpoints), ('tree', args.trees))
        for seed in range(args.seed, args.seed + count)]
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
