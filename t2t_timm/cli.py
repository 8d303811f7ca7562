"""t2t-timm: the command line. Every command is one call into the package."""
import argparse
import io
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import UserError

__all__ = ['main']


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='t2t-timm', description='T2T-ViT for timm.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    def command(name: str, run: Callable[[argparse.Namespace], int | None], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=help)
        sub.set_defaults(run=run)
        return sub

    sub = command('recipe', _recipe, "Print the path of a training recipe for timm's train.py --config.")
    sub.add_argument('name', metavar='NAME', nargs='?', help='name of the recipe; without it, list all recipes')

    sub = command('digits', _digits, 'Write the 1,000 held-out images of test_t2t_vit, one folder per digit.')
    sub.add_argument('out_dir', metavar='DIR', help='folder to write to; it must be empty or new')

    sub = command('val-tree', _val_tree, "Sort ImageNet's validation images by class, for timm's validate.py.")
    sub.add_argument('images', metavar='IMAGES|TAR', help='folder or tar file with the images')
    sub.add_argument('labels', metavar='LABELS', help='text file, one line NAME.JPEG LABEL per image, labels 0 to 999')
    sub.add_argument('out', metavar='OUT', help='folder to create')

    sub = command('push', _push, 'Upload the weights, config and model card of a converted folder to the Hub.')
    sub.add_argument('dir', metavar='DIR', help='folder written by `t2t-timm convert`')
    sub.add_argument('repo', metavar='REPO', nargs='?', help='Hub repo (default: t2t-timm/ARCH.TAG, from config.json)')
    sub.add_argument('--private', action='store_true', help='if the repo is created, make it private')
    sub.add_argument('--dry-run', action='store_true', help='upload nothing, only show what would be uploaded')

    sub = command('publish', _publish, "Convert the publishers' weights and upload each tag to a Hub repo of its own.")
    sub.add_argument('tags', metavar='TAG', nargs='*', help='such as t2t_vit_14.in1k (default: all with a release)')
    sub.add_argument('--namespace', help='Hub user or organization (default: T2T_TIMM_HUB_NAMESPACE, or t2t-timm)')
    sub.add_argument('--from', dest='source', metavar='DIR', help="folder with the publishers' files, to download none")
    sub.add_argument(
        '--manifest', metavar='FILE', help='manifest.yaml to write hashes and sizes into, instead of printing a patch')
    sub.add_argument('--private', action='store_true', help='if a repo is created, make it private')
    sub.add_argument('--dry-run', action='store_true', help='fetch, convert and verify, but upload nothing')

    sub = command('convert', _convert, 'Convert a checkpoint of any known format to a folder that timm can load.')
    sub.add_argument('file', metavar='FILE', help='checkpoint file; the format is recognised by its content')
    sub.add_argument(
        '--model', metavar='ARCH[.TAG]', required=True,
        help='architecture, such as t2t_vit_14; with the tag if the file is a published one')
    sub.add_argument('--out', metavar='DIR', required=True, help='folder to create')
    sub.add_argument(
        '--labels', metavar='FOLDER|FILE',
        help='names of your classes: the training folder, with one folder per class, or a file with one name per line')

    sub = command('verify', _verify, "Describe a checkpoint, check that it loads, and compare it with another.")
    sub.add_argument('first', metavar='DIR|FILE|TAG', help='converted folder, checkpoint file, or tag to download')
    sub.add_argument('second', metavar='SECOND', nargs='?', help='another one, which should give the same logits')
    sub.add_argument('--model', metavar='ARCH[.TAG]', help='architecture, if the file fits more than one')

    sub = command('cards', _cards, 'Write the model card of every tag.')
    sub.add_argument('--out', metavar='DIR', default='model_cards', help='folder to write to (default: %(default)s)')
    sub.add_argument('--check', action='store_true', help='write nothing; exit code 1 if a card is out of date')

    sub = command('models', _models, 'List all pretrained models, what they cost, and where their weights come from.')
    sub.add_argument(
        '--check', action='store_true',
        help='ask the Hub which weights are there and as this version expects them; exit code 1 unless all are')

    sub = command('classify', _classify, 'Classify image files and print the most probable classes.')
    sub.add_argument('images', metavar='IMAGE', nargs='+', help='image files, folders or patterns such as "*.jpg"')
    sub.add_argument('--model', default='t2t_vit_14', help='name, local-dir:DIR or hf-hub:REPO (default: %(default)s)')
    sub.add_argument('--topk', type=int, default=5, metavar='K', help='classes per image (default: %(default)s)')
    sub.add_argument('--json', action='store_true', help='print the result as JSON')

    sub = command('export', _export, 'Export a model; the file is kept only if its logits agree with the model.')
    sub.add_argument('model', metavar='MODEL', help='model name, or local-dir:DIR for a converted folder')
    sub.add_argument('--format', default='onnx', help='onnx (the default), openvino, export, aoti or torchscript')
    sub.add_argument('--out', metavar='FILE', required=True, help='file to write; for openvino NAME.xml, with NAME.bin')
    sub.add_argument('--quantize', metavar='int8', help='make an int8 model (onnx, openvino); needs --calibration')
    sub.add_argument('--calibration', metavar='FOLDER', help='images to compare the int8 model on')
    sub.add_argument('--img-size', type=int, nargs='+', metavar='N', help='height and width, or one for both')
    sub.add_argument('--dynamic', action='store_true', help='images of any size (the batch size is always free)')
    sub.add_argument('--untrained', action='store_true', help='use random weights instead of pretrained ones')

    for name, run, help in (
            ('attention', _attention, 'Draw where the class token and both token layers look.'),
            ('features', _features, 'Draw channels of the feature maps, of the tokens-to-token stages and of blocks.'),
    ):
        sub = command(name, run, help)
        sub.add_argument('image', metavar='IMAGE', help='image file')
        sub.add_argument('--model', default='t2t_vit_14', help='model name, or local-dir:DIR (default: %(default)s)')
        sub.add_argument('--out', metavar='PNG', required=True, help='PNG file to write')
        sub.add_argument('--img-size', type=int, nargs='+', metavar='N', help='height and width, or one for both')
        sub.add_argument('--untrained', action='store_true', help='use random weights instead of pretrained ones')
    sub.add_argument(
        '--blocks', type=int, nargs='+', metavar='I', help='block numbers, from 1 (default: first, middle and last)')
    return parser


def _recipe(args: argparse.Namespace) -> None:
    from .recipes import recipe_names, recipe_path
    print('\n'.join(recipe_names()) if args.name is None else recipe_path(args.name))


def _digits(args: argparse.Namespace) -> None:
    from .digits import extract_heldout
    print(extract_heldout(args.out_dir))


def _val_tree(args: argparse.Namespace) -> None:
    from .commands.val_tree import val_tree
    print(val_tree(args.images, args.labels, args.out))


def _push(args: argparse.Namespace) -> None:
    from .hub.push import push
    print(push(args.dir, args.repo, private=args.private, dry_run=args.dry_run), end='')


def _publish(args: argparse.Namespace) -> int:
    from .hub.publish import publish
    done = publish(args.tags, args.namespace, args.source, args.manifest, args.private, args.dry_run)
    print(done.patch, end='')
    return 1 if done.failed else 0


def _convert(args: argparse.Namespace) -> None:
    from .hub.convert import convert
    print(convert(args.file, args.model, args.out, args.labels))


def _verify(args: argparse.Namespace) -> int:
    from .hub.verify import verify
    verdict = verify(args.first, args.second, args.model)
    print('\n'.join(verdict.lines))
    return 0 if verdict.good else 1


def _cards(args: argparse.Namespace) -> None:
    from .hub.cards import write_cards
    write_cards(args.out, check=args.check)


def _models(args: argparse.Namespace) -> int:
    if args.check:
        from .hub.check import check_hub
        verdict = check_hub()
        print('\n'.join(verdict.lines))
        return 0 if verdict.good else 1
    from .hub.tables import models_table
    print(models_table())
    return 0


def _classify(args: argparse.Namespace) -> int:
    from .commands.classify import classify, render
    done = classify(args.images, args.model, args.topk)
    if done.results or args.json:
        print(render(done, args.json))
    for file, why in done.unreadable.items():
        print(f'{file}: cannot be read: {why}', file=sys.stderr)
    return 1 if done.unreadable else 0


def _img_size(args: argparse.Namespace) -> dict:
    if args.img_size is None:
        return {}
    if len(args.img_size) > 2 or min(args.img_size) < 3:
        raise UserError('--img-size takes a height and a width, or one number for both, of 3 pixels or more.')
    return {'img_size': (args.img_size[0], args.img_size[-1])}


def _export(args: argparse.Namespace) -> None:
    from .commands.export import export_model
    from .commands.load import load_t2t_vit
    model = load_t2t_vit(args.model, args.untrained, dynamic_img_size=args.dynamic, **_img_size(args))
    print(export_model(model, args.out, args.format, args.quantize, args.calibration))


def _attention(args: argparse.Namespace) -> None:
    from .commands.load import load_t2t_vit
    from .commands.pictures import draw_attention, read_image, save_picture
    model = load_t2t_vit(args.model, args.untrained, **_img_size(args))
    figure = draw_attention(model, read_image(args.image, model), args.model, args.untrained)
    print(save_picture(figure, args.out))


def _features(args: argparse.Namespace) -> None:
    from .commands.load import load_t2t_vit
    from .commands.pictures import draw_features, read_image, save_picture
    model = load_t2t_vit(args.model, args.untrained, **_img_size(args))
    figure = draw_features(model, read_image(args.image, model), args.model, args.blocks, args.untrained)
    print(save_picture(figure, args.out))


@contextmanager
def _steps_on_stderr() -> Iterator[None]:
    # this package's steps only: huggingface_hub has a handler of its own
    logger, handler = logging.getLogger('t2t_timm'), logging.StreamHandler(sys.stderr)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _reason(e: Exception) -> str:
    if isinstance(e, OSError) and e.strerror and isinstance(e.filename, str):
        return f'{e.filename}: {e.strerror}.'  # without the number, which says nothing to a user
    return str(e)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 1, after one sentence and without a traceback, for a user's mistake."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == 'strict':
            stream.reconfigure(errors='backslashreplace')  # a name may have letters that a console has not
    args = _parser().parse_args(argv)
    try:
        with _steps_on_stderr():
            return args.run(args) or 0
    except (UserError, ValueError, OSError) as e:
        print(f't2t-timm {args.command}: {_reason(e)}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f't2t-timm {args.command}: interrupted', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())
