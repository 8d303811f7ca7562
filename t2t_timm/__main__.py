"""python -m t2t_timm SCRIPT ARGS...: run any script with the models registered, where the start-up hook is off."""
import runpy
import sys
from pathlib import Path

import t2t_timm  # noqa: F401


def main() -> None:
    """Run the script named on the command line as Python itself would."""
    if len(sys.argv) < 2 or sys.argv[1] in ('-h', '--help'):
        sys.exit(f'usage: python -m t2t_timm SCRIPT ARGS...\n\n{__doc__}')
    script = Path(sys.argv[1])
    if not script.is_file():
        sys.exit(f'python -m t2t_timm: no script at {script}')
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name='__main__')


if __name__ == '__main__':
    main()
