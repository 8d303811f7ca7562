"""t2t-timm: the command line. Thin: every command is one call into the rooms of the package."""
import argparse
import logging
import sys
from typing import Callable, List, Optional

from ._errors import UserError

__all__ = ['main']


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='t2t-timm', description='T2T-ViT for timm.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    def command(name: str, run: Callable[[argparse.Namespace], Optional[int]], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    sub = command('recipe', _recipe, 'Print the path of a training recipe for train.py --config.')
    sub.add_argument('name', nargs='?', help='recipe, by default list them')

    sub = command('digits', _digits, 'Write the 1,000 held-out digits of test_t2t_vit as an ImageFolder.')
    sub.add_argument('out_dir', help='folder to write; empty or new')

    sub = command('push', _push, "Upload a converted folder's weights, config and card to the Hub.")
    sub.add_argument('dir', metavar='DIR', help='folder that `t2t-timm convert` wrote')
    sub.add_argument('repo', metavar='REPO', nargs='?', help='Hub repo, by default that of the architecture.tag')
    sub.add_argument('--private', action='store_true', help='make the repo private if it is created')
    sub.add_argument('--dry-run', action='store_true', help='only show what would be uploaded')
    return parser


def _recipe(args: argparse.Namespace) -> None:
    from .recipes import recipe_names, recipe_path
    print('\n'.join(recipe_names()) if args.name is None else recipe_path(args.name))


def _digits(args: argparse.Namespace) -> None:
    from .digits import extract_heldout
    print(extract_heldout(args.out_dir))


def _push(args: argparse.Namespace) -> None:
    from .hub.push import push
    print(push(args.dir, args.repo, private=args.private, dry_run=args.dry_run), end='')


def main(argv: Optional[List[str]] = None) -> int:
    """Run a command and return its exit code; a user's mistake is one sentence and 1, never a traceback."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(message)s', stream=sys.stderr)
    try:
        return args.run(args) or 0
    except (UserError, ValueError, OSError) as e:
        print(f't2t-timm {args.command}: {e}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f't2t-timm {args.command}: interrupted', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())
