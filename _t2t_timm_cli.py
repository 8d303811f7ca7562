"""t2t-timm, the command: it answers `--help` without torch, which takes seconds to import.

Importing a part of t2t_timm first runs t2t_timm/__init__.py, which imports torch. So `main` makes the package itself,
as an import would, but without running it; `t2t_timm.cli.main` imports the models for the commands that need them.
"""
import signal
import sys
from importlib.util import find_spec, module_from_spec

__all__ = ['main']


def main() -> int:
    """Run the command line and return its exit code."""
    if 't2t_timm' not in sys.modules:
        sys.modules['t2t_timm'] = module_from_spec(find_spec('t2t_timm'))
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Outside a command Ctrl-C ends the process at once: Python's own end would be a traceback, and packages that
        # are being imported make other errors of KeyboardInterrupt.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from t2t_timm.cli import main
    return main()


if __name__ == '__main__':
    sys.exit(main())
