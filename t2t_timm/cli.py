"""t2t-timm: the command line. What it needs is imported inside main(), which catches Ctrl-C from then on."""
import sys

__all__ = ['main']

WITHOUT_MODELS = ('.recipes', '.digits', '.commands.val_tree')


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
    _show_any_letter()
    from importlib import import_module

    from .arguments import make_parser
    args, unknown = make_parser().parse_known_args(argv)
    if unknown:
        args.parser.error(f'unrecognized arguments: {" ".join(unknown)}')  # with the usage of the command
    ctrl_c.name += f' {args.command}'
    if args.module not in WITHOUT_MODELS:
        import_module('.models', __package__)  # first, since timm registers them as soon as another room imports it
    import_module(args.module, __package__)
    ctrl_c.importing = False
    with _StepsOnStderr():
        return args.run(args) or 0


class _CtrlC:
    """Raises KeyboardInterrupt, but ends the process at once while packages are imported.

    Some of them catch it there, or make other errors of it.
    """

    def __init__(self, ends: bool) -> None:
        self.ends = ends  # the process does, after the command
        self.name = 't2t-timm'
        self.importing = True
        self.pressed = False

    def __enter__(self) -> None:
        import signal
        try:
            self.before = signal.signal(signal.SIGINT, self._press)
        except ValueError:  # in a thread, which gets no signals
            self.before = None

    def __exit__(self, *error: object) -> None:
        import signal
        if self.before is not None:
            signal.signal(signal.SIGINT, signal.SIG_DFL if self.ends else self.before)

    def _press(self, signal: int, frame: object) -> None:
        self.pressed = True
        if not self.importing:
            raise KeyboardInterrupt
        import os
        os.write(2, f'{self.name}: interrupted\n'.encode())
        os._exit(130)  # nothing has been written that would have to be removed


def _show_any_letter() -> None:
    import io
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == 'strict':
            stream.reconfigure(errors='backslashreplace')  # a name may have letters that a console has not


def _reason(e: Exception) -> str | None:
    """Return what to tell the user, or None if it is no user's mistake."""
    import errno

    from .errors import UserError, file_reason, printable
    if isinstance(e, OSError) and e.strerror and e.filename is not None:
        return printable(f'{file_reason(e)}.')  # without the number, which says nothing to a user
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EFBIG, errno.EIO):
        _give_up_output()  # commands name every file but the one that they print to
        return f'standard output: {e.strerror}.'
    return printable(str(e)) if isinstance(e, (UserError, ValueError, OSError)) else None


def _give_up_output() -> None:
    """Leave Python nothing to write at its end, where it would complain a second time."""
    import contextlib
    import os
    with contextlib.suppress(OSError):  # it may be no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _StepsOnStderr:
    """Shows this package's steps, and no other's: huggingface_hub has a handler of its own, for its errors alone."""

    def __enter__(self) -> None:
        import logging
        self.logger, self.handler = logging.getLogger('t2t_timm'), logging.StreamHandler(sys.stderr)
        self.level = self.logger.level
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(self.handler)
        self.hub_logger = logging.getLogger('huggingface_hub')  # It warns of each attempt to reach a server.
        self.hub_level = self.hub_logger.level
        self.hub_logger.setLevel(logging.ERROR)

    def __exit__(self, *error: object) -> None:
        self.logger.removeHandler(self.handler)
        self.logger.setLevel(self.level)
        self.hub_logger.setLevel(self.hub_level)


if __name__ == '__main__':
    sys.exit(main())
