"""What the command t2t-timm does. What takes long to import is imported inside main(), which catches Ctrl-C."""
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

__all__ = ['main']

WITHOUT_MODELS = ('recipe', 'digits')  # commands that answer before torch could be imported


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 1, after one sentence and without a traceback, for a user's mistake."""
    ctrl_c = _CtrlC(ends=argv is None)
    try:
        with ctrl_c:
            try:
                return _run(argv, ctrl_c)
            finally:
                sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output has enough of it
        _give_up_output()
        return 141  # what a shell gives for a program that SIGPIPE ended
    except (Exception, KeyboardInterrupt) as e:
        reason = 'interrupted' if ctrl_c.pressed or isinstance(e, KeyboardInterrupt) else _reason(e)
        if reason is None:
            raise
        print(f'{ctrl_c.name}: {reason}', file=sys.stderr)
        return 130 if reason == 'interrupted' else 1


def _run(argv: list[str] | None, ctrl_c: '_CtrlC') -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == 'strict':
            stream.reconfigure(errors='backslashreplace')  # a name may have letters that a console has not

    from .arguments import make_parser
    args, unknown = make_parser().parse_known_args(argv)
    if unknown:
        args.parser.error(f'unrecognized arguments: {" ".join(unknown)}')  # with the usage of the command
    ctrl_c.name += f' {args.command}'
    if args.command not in WITHOUT_MODELS:
        from . import models  # noqa: F401  # first, since timm registers them as soon as another room imports it
    ctrl_c.importing = False
    with _steps_on_stderr():
        return args.run(args) or 0


class _CtrlC:
    """Raises KeyboardInterrupt, but ends the process at once while torch and timm are imported.

    Some packages catch it there, or make other errors of it.
    """

    def __init__(self, ends: bool) -> None:
        self.ends = ends  # the process does, after the command
        self.name = 't2t-timm'
        self.importing = True
        self.pressed = False

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGINT, self._press)

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL if self.ends else self.before)

    def _press(self, signum: int, frame: object) -> None:
        self.pressed = True
        if not self.importing:
            raise KeyboardInterrupt
        os.write(2, f'{self.name}: interrupted\n'.encode())
        os._exit(130)  # nothing has been written that would have to be removed


def _reason(e: Exception) -> str | None:
    """Return what to tell the user, or None if it is no user's mistake."""
    from .errors import UserError, file_reason, printable
    if isinstance(e, OSError) and e.strerror and e.filename is not None:
        return printable(f'{file_reason(e)}.')  # without the number, which says nothing to a user
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EFBIG, errno.EIO):
        _give_up_output()  # commands name every file but the one that they print to
        return f'standard output: {e.strerror}.'
    return printable(str(e)) if isinstance(e, (UserError, ValueError, OSError)) else None


def _give_up_output() -> None:
    """Leave Python nothing to write at its end, where it would complain a second time."""
    with suppress(OSError):  # it may be no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _steps_on_stderr() -> Iterator[None]:
    """Show this package's steps, and of huggingface_hub only errors: it warns of each attempt to reach a server."""
    import logging
    handler, levels = logging.StreamHandler(sys.stderr), {'t2t_timm': logging.INFO, 'huggingface_hub': logging.ERROR}
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    logging.getLogger('t2t_timm').addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger('t2t_timm').removeHandler(handler)
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


if __name__ == '__main__':
    sys.exit(main())
