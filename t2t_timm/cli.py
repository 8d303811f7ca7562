"""t2t-timm: runs a command and tells what went wrong. The models are imported inside main(), and not for --help."""
import argparse
import errno
import io
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .arguments import make_parser
from .errors import UserError, file_reason, printable

__all__ = ['main']

WITHOUT_MODELS = ('recipe', 'digits')  # commands that answer before torch could be imported


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 1, after one sentence and without a traceback, for a user's mistake."""
    name = 't2t-timm'
    try:
        try:
            args = _parse(argv)
            name = f't2t-timm {args.command}'
            if args.command not in WITHOUT_MODELS:
                from . import models  # noqa: F401  # first: timm registers them when another subpackage imports it
            with _ctrl_c(), _steps_on_stderr():
                return args.run(args) or 0
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output has enough of it
        _give_up_output()
        return 141  # what a shell gives for a program that SIGPIPE ended
    except (Exception, KeyboardInterrupt) as e:
        reason = 'interrupted' if _is_interrupt(e) else _reason(e)
        if reason is None:
            raise
        print(f'{name}: {reason}', file=sys.stderr)
        return 130 if reason == 'interrupted' else 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == 'strict':
            stream.reconfigure(errors='backslashreplace')  # a name may have letters that a console has not
    args, unknown = make_parser().parse_known_args(argv)
    if unknown:
        args.parser.error(f'unrecognized arguments: {" ".join(unknown)}')  # with the usage of the command
    return args


def _is_interrupt(e: BaseException | None) -> bool:
    """Return True if an error is KeyboardInterrupt, or what a library made of it."""
    return e is not None and (isinstance(e, KeyboardInterrupt) or _is_interrupt(e.__context__))


def _reason(e: BaseException) -> str | None:
    """Return what to tell the user, or None if it is no user's mistake."""
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
def _ctrl_c() -> Iterator[None]:
    """Make Ctrl-C an exception where it would end the process, as `_t2t_timm_cli` has it outside a command."""
    ends = signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    if ends:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        if ends:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def _steps_on_stderr() -> Iterator[None]:
    """Show this package's steps, and of huggingface_hub only errors: it warns of each attempt to reach a server."""
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
