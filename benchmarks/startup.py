"""What the start-up hook costs: Python's start with it, against with T2T_TIMM_AUTOLOAD=0 and against without the file.

    python benchmarks/startup.py

Alternates the cases over many starts and prints the medians, in milliseconds; then what -X importtime says of the hook.
"""
import os
import re
import statistics
import subprocess
import sys
import time

ROUNDS = 60
CASES = {
    'hook': ([], {}),
    'T2T_TIMM_AUTOLOAD=0': ([], {'T2T_TIMM_AUTOLOAD': '0'}),
    'no site-packages (-S)': (['-S'], {}),
}


def start(flags, variables) -> float:
    """Return how long Python takes to start and stop, in milliseconds."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, *flags, '-c', 'pass'], check=True, env=dict(os.environ, **variables))
    return 1e3 * (time.perf_counter() - begin)


def main() -> None:
    """Print the table."""
    times = {name: [] for name in CASES}
    for _ in range(ROUNDS):
        for name, case in CASES.items():
            times[name].append(start(*case))
    for name, values in times.items():
        print(f'{name:24}{statistics.median(values):8.2f} ms (median of {ROUNDS})')
    microseconds = []
    for _ in range(ROUNDS):
        run = subprocess.run([sys.executable, '-X', 'importtime', '-c', 'pass'], capture_output=True, text=True)
        line = next(line for line in run.stderr.splitlines() if '_t2t_timm_autoload' in line)
        microseconds.append(int(re.findall(r'\d+', line)[1]))
    print(f'{"-X importtime":24}{statistics.median(microseconds) / 1e3:8.2f} ms for the hook, all it imports included')


if __name__ == '__main__':
    main()
