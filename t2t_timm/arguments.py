"""The arguments of every command, and the one call into the package that each command is."""
import argparse
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NoReturn

from .errors import UserError, suggestion
from .version import __version__

__all__ = ['make_parser']

Run = Callable[[argparse.Namespace], int | None]


class _Parser(argparse.ArgumentParser):
    """Adds a suggestion to its complaint about a command or an option that it does not know."""

    def error(self, message: str) -> NoReturn:
        command = re.search(r"COMMAND: invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if command:
            hint = suggestion(command[1], re.findall(r'[\w-]+', command[2]))
        else:
            unknown = re.findall(r'--[\w-]+', message.partition('unrecognized arguments: ')[2])
            hint = next(filter(None, (suggestion(option, self._option_string_actions) for option in unknown)), '')
        super().error(f'{message}.{hint}' if hint else message)


def _add_command(commands: Any, name: str, run: Run, help: str, *examples: str) -> argparse.ArgumentParser:
    """Add a command to the parsers of commands, with examples of its arguments, and return its parser."""
    sub = commands.add_parser(
        name, help=help, description=help, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='\n'.join(['examples:', *(f'  t2t-timm {name} {example}'.rstrip() for example in examples)]))
    sub.set_defaults(run=run, parser=sub)
    return sub


def make_parser() -> argparse.ArgumentParser:
    """Return the parser.

    What it parses has `run`, which is called with it and returns an exit code or None, and `parser`, the command's own.
    """
    parser = _Parser(
        prog='t2t-timm', description='T2T-ViT for timm.', epilog='`t2t-timm COMMAND --help` has examples.')
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')
    _add_use(commands)  # in the order of --help: what most people use comes first
    _add_pictures(commands)
    _add_checkpoints(commands)
    _add_data(commands)
    _add_publishing(commands)
    return parser


def _add_data(commands: Any) -> None:
    sub = _add_command(
        commands, 'recipe', _recipe,
        "Print the path of a training recipe for timm's train.py --config.", '', 't2t_vit_14')
    sub.add_argument('name', metavar='NAME', nargs='?', help='name of the recipe; without it, list all recipes')

    sub = _add_command(
        commands, 'digits', _digits,
        'Write the 1,000 held-out images of test_t2t_vit, one folder per digit.', 'digits')
    sub.add_argument('out_dir', metavar='DIR', help='folder to write to; it must be empty or new')

    sub = _add_command(
        commands, 'val-tree', _val_tree,
        "Sort ImageNet's validation images by class, for timm's validate.py.",
        'ILSVRC2012_img_val.tar val.txt imagenet/val')
    sub.add_argument('images', metavar='IMAGES|TAR', help='folder or tar file with the images')
    sub.add_argument('labels', metavar='LABELS', help='text file, one line NAME.JPEG LABEL per image, labels 0 to 999')
    sub.add_argument('out', metavar='OUT', help='folder to create')


def _add_publishing(commands: Any) -> None:
    sub = _add_command(
        commands, 'publish', _publish,
        "Convert the publishers' weights and upload each tag to a Hub repo of its own.",
        't2t_vit_14.in1k --namespace my-company')
    sub.add_argument('tags', metavar='TAG', nargs='*', help='such as t2t_vit_14.in1k (default: all with a release)')
    sub.add_argument('--namespace', help='Hub user or organization (default: T2T_TIMM_HUB_NAMESPACE, or t2t-timm)')
    sub.add_argument('--from', dest='source', metavar='DIR', help="folder with the publishers' files, to download none")
    sub.add_argument('--manifest', metavar='FILE', help='manifest.yaml to write hashes and sizes to (default: printed)')
    sub.add_argument('--private', action='store_true', help='if a repo is created, make it private')
    sub.add_argument('--dry-run', action='store_true', help='fetch, convert and verify, but upload nothing')

    sub = _add_command(commands, 'cards', _cards, 'Write the model card of every tag.', '--check')
    sub.add_argument('--out', metavar='DIR', default='model_cards', help='folder to write to (default: %(default)s)')
    sub.add_argument('--check', action='store_true', help='write nothing; exit code 1 if a card is out of date')


def _add_checkpoints(commands: Any) -> None:
    sub = _add_command(
        commands, 'convert', _convert, 'Convert a checkpoint of any known format to a folder that timm can load.',
        '81.5_T2T_ViT_14.pth.tar --model t2t_vit_14.in1k --out converted',
        'model_best.pth.tar --model t2t_vit_14 --labels photos/train --out converted')
    sub.add_argument('file', metavar='FILE', help='checkpoint file; the format is recognised by its content')
    sub.add_argument(
        '--model', metavar='ARCH[.TAG]', required=True,
        help='architecture, such as t2t_vit_14; with the tag if the file is a published one')
    sub.add_argument('--out', metavar='DIR', required=True, help='folder to create')
    sub.add_argument(
        '--labels', metavar='FOLDER|FILE',
        help='names of your classes: the training folder, with one folder per class, or a file with one name per line')
    _add_checkpoint(sub)

    sub = _add_command(
        commands, 'verify', _verify, "Describe a checkpoint, check that it loads, and compare it with another.",
        'converted', 'converted model_best.pth.tar')
    sub.add_argument('first', metavar='DIR|FILE|TAG', help='converted folder, checkpoint file, or tag to download')
    sub.add_argument('second', metavar='SECOND', nargs='?', help='another one, which should give the same logits')
    sub.add_argument('--model', metavar='ARCH[.TAG]', help='architecture, if the file fits more than one')
    _add_checkpoint(sub)

    sub = _add_command(
        commands, 'push', _push, 'Upload the weights, config and model card of a converted folder to the Hub.',
        'converted me/my-t2t-vit --private')
    sub.add_argument('dir', metavar='DIR', help='folder written by `t2t-timm convert`')
    sub.add_argument('repo', metavar='REPO', nargs='?', help='Hub repo (default: t2t-timm/ARCH.TAG, from config.json)')
    sub.add_argument('--private', action='store_true', help='if the repo is created, make it private')
    sub.add_argument('--dry-run', action='store_true', help='upload nothing, only show what would be uploaded')
    sub.add_argument('--force', action='store_true', help='upload a card that still has places to fill in')


def _add_checkpoint(sub: argparse.ArgumentParser) -> None:
    _add_img_size(sub, ', if the file does not say them')
    sub.add_argument('--key', help='which model to take of a file that holds several, such as teacher')


def _add_use(commands: Any) -> None:
    sub = _add_command(
        commands, 'models', _models,
        'List all pretrained models, what they cost, and where their weights come from.',
        '', '--csv')
    form = sub.add_mutually_exclusive_group()
    form.add_argument(
        '--check', action='store_true',
        help='ask the Hub which weights are there and as this version expects them; exit code 1 unless all are')
    form.add_argument('--json', action='store_true', help='print the list as JSON')
    form.add_argument(
        '--csv', action='store_true', help="print those of ImageNet in the columns of timm's results-imagenet.csv")

    sub = _add_command(
        commands, 'classify', _classify, 'Classify image files and print the most probable classes.',
        'photo.jpg', 'photos/ --model local-dir:converted --csv --out classes.csv',
        'photos/ --workers 4 --embeddings --parquet --out vectors.parquet --resume')
    sub.add_argument('images', metavar='IMAGE', nargs='+', help='image files, folders or patterns such as "*.jpg"')
    sub.add_argument('--model', default='t2t_vit_14', help='name, local-dir:DIR or hf-hub:REPO (default: %(default)s)')
    sub.add_argument('--topk', type=int, default=5, metavar='K', help='classes per image (default: %(default)s)')
    sub.add_argument('--batch-size', type=int, default=16, metavar='N', help='images at a time (default: %(default)s)')
    sub.add_argument('--workers', type=int, default=0, metavar='N', help='processes that read images (default: none)')
    sub.add_argument('--device', default='cpu', help='such as cuda (default: %(default)s)')
    sub.add_argument('--amp', choices=('bfloat16', 'float16'), help='compute in this lower precision (autocast)')
    _add_img_size(sub)
    sub.add_argument('--embeddings', action='store_true', help='add the vectors the classifier reads (JSON, Parquet)')
    form = sub.add_mutually_exclusive_group()
    for name, what in (('json', 'JSON'), ('csv', 'CSV, one line per class'), ('parquet', 'Parquet, one row per image')):
        form.add_argument(
            f'--{name}', dest='form', action='store_const', const=name, default='text', help=f'give results as {what}')
    sub.add_argument('--out', metavar='FILE', help='file to write instead of printing')
    sub.add_argument('--resume', action='store_true', help='go on with what a run with the same --out has left')

    sub = _add_command(
        commands, 'export', _export,
        'Export a model; the file is kept only if its logits agree with the model.',
        't2t_vit_14 --out t2t.onnx', 'local-dir:converted --format openvino --dynamic --out t2t.xml')
    sub.add_argument('model', metavar='MODEL', help='model name, or local-dir:DIR for a converted folder')
    sub.add_argument(
        '--format', default='onnx',
        help='onnx (the default), openvino, export, aoti, torchscript, executorch or transformers.js')
    sub.add_argument(
        '--out', metavar='FILE', required=True,
        help='file to write; for openvino NAME.xml, with NAME.bin; for transformers.js a new folder')
    sub.add_argument('--opset', type=int, metavar='N', help='opset of an onnx file, 16 to 24 (default: 20)')
    sub.add_argument('--dtype', help='float16: a file that computes (onnx) or has its weights (openvino) in it')
    sub.add_argument(
        '--quantize', metavar='int8', help='make an int8 model (onnx, openvino, transformers.js); needs --calibration')
    sub.add_argument('--calibration', metavar='FOLDER', help='images to compare the int8 model on')
    _add_img_size(sub)
    sub.add_argument('--dynamic', action='store_true', help='images of any size (the batch size is always free)')
    sub.add_argument('--untrained', action='store_true', help='use random weights instead of pretrained ones')


def _add_pictures(commands: Any) -> None:
    for name, help in (
            ('attention', 'Draw what the class token, and some tokens of the token layers, attend to.'),
            ('features', 'Draw channels of the feature maps, of the tokens-to-token stages and of blocks.'),
    ):
        sub = _add_command(commands, name, _draw, help, f'photo.jpg --out {name}.png')
        sub.add_argument('image', metavar='IMAGE', help='image file')
        sub.add_argument('--model', default='t2t_vit_14', help='model name, or local-dir:DIR (default: %(default)s)')
        sub.add_argument('--out', metavar='PNG', required=True, help='PNG file to write')
        _add_img_size(sub)
        sub.add_argument('--untrained', action='store_true', help='use random weights instead of pretrained ones')
    sub.add_argument('--blocks', type=int, nargs='+', metavar='I', help='blocks, from 1 (default: first, middle, last)')


def _add_img_size(sub: argparse.ArgumentParser, when: str = '') -> None:
    sub.add_argument('--img-size', type=int, nargs='+', metavar='N', help=f'height and width, or one for both{when}')


def _next_step(*commands: str) -> None:
    print('Next: ' + ', or '.join(f'`{command}`' for command in commands), file=sys.stderr)


def _tell(verdict: Any) -> int:
    print('\n'.join(verdict.lines))
    return 0 if verdict.good else 1


def _require(package: str, what: str) -> None:
    if find_spec(package) is None:
        raise UserError(f'{what} {package}: pip install {package}')


def _recipe(args: argparse.Namespace) -> None:
    from .recipes import recipe_names, recipe_path
    print('\n'.join(recipe_names()) if args.name is None else recipe_path(args.name))


def _digits(args: argparse.Namespace) -> None:
    from .digits import extract_heldout
    out = extract_heldout(args.out_dir)
    print(out)
    _next_step(f't2t-timm classify {out}/3_three --model test_t2t_vit --topk 1')


def _val_tree(args: argparse.Namespace) -> None:
    from .commands.val_tree import val_tree
    print(val_tree(args.images, args.labels, args.out))


def _push(args: argparse.Namespace) -> None:
    from .hub.push import push
    print(push(args.dir, args.repo, args.private, args.dry_run, args.force))


def _publish(args: argparse.Namespace) -> int:
    from .hub.publish import publish
    patch, failed = publish(args.tags, args.namespace, args.source, args.manifest, args.private, args.dry_run)
    print(patch, end='')
    return 1 if failed else 0


def _convert(args: argparse.Namespace) -> None:
    from .hub.convert import convert
    out = convert(args.file, args.model, args.out, args.labels, key=args.key, **_img_size(args))
    print(out)
    _next_step(f't2t-timm verify {args.file} {out}', f't2t-timm classify IMAGE --model local-dir:{out}')


def _verify(args: argparse.Namespace) -> int:
    from .hub.verify import verify
    return _tell(verify(args.first, args.second, args.model, key=args.key, **_img_size(args)))


def _cards(args: argparse.Namespace) -> None:
    from .hub.cards import write_cards
    write_cards(args.out, check=args.check)


def _models(args: argparse.Namespace) -> int:
    from .hub.tables import compare_with_hub, models_csv, models_json, models_table
    if args.check:
        return _tell(compare_with_hub())
    print(models_json() if args.json else models_csv() if args.csv else models_table())
    return 0


def _classify(args: argparse.Namespace) -> int:
    from pathlib import Path

    import torch

    from .commands.classify import classify
    from .commands.results import tell_errors, write_results, write_resumable
    from .files import check_target
    if args.embeddings and args.form not in ('json', 'parquet'):
        raise UserError('--embeddings needs --json or --parquet, which have a place for vectors.')
    if args.out is None and (args.resume or args.form == 'parquet'):
        raise UserError(f'--{"resume" if args.resume else "parquet"} needs --out FILE.')
    if args.form == 'parquet':
        _require('pyarrow', 'Parquet needs')
    options = dict(
        model=args.model, topk=args.topk, amp=args.amp and getattr(torch, args.amp), embeddings=args.embeddings,
        **_img_size(args))
    failed: list[str] = []

    def results(skip: list[str]):
        return tell_errors(classify(
            args.images, batch_size=args.batch_size, device=args.device, workers=args.workers, skip=skip,
            progress=args.out is not None or not sys.stdout.isatty(), **options), failed)

    if args.out is None:
        write_results(results([]), args.form)
    else:
        check_target(args.out, '.txt' if args.form == 'text' else f'.{args.form}')
        write_resumable(
            results, args.form, Path(args.out), {name: str(value) for name, value in options.items()}, args.resume)
        print(args.out)
    return 1 if failed else 0


def _img_size(args: argparse.Namespace) -> dict:
    if args.img_size is None:
        return {}
    if len(args.img_size) > 2 or min(args.img_size) < 3:
        raise UserError('--img-size takes a height and a width, or one number for both, of 3 pixels or more.')
    return {'img_size': (args.img_size[0], args.img_size[-1])}


def _export(args: argparse.Namespace) -> None:
    from pathlib import Path

    from .commands.export import Export
    from .commands.load import load_t2t_vit
    export = Export(
        Path(args.out), args.format, args.quantize, args.calibration, args.opset, args.dtype, args.dynamic)
    print(export.run(load_t2t_vit(args.model, args.untrained, dynamic_img_size=args.dynamic, **_img_size(args))))


def _draw(args: argparse.Namespace) -> None:
    from .commands.images import open_image
    from .commands.load import load_t2t_vit
    from .commands.pictures import draw_attention, draw_features, read_image, save_picture
    from .files import check_target
    _require('matplotlib', 'Pictures need')
    check_target(args.out, '.png')
    try:
        open_image(args.image)  # before weights are fetched
    except ValueError as e:
        raise UserError(f'{args.image} cannot be read as an image: {e}') from e
    model = load_t2t_vit(args.model, args.untrained, **_img_size(args))
    image = read_image(args.image, model)
    name = f'{args.model}, random weights' if args.untrained else args.model
    if args.command == 'attention':
        figure = draw_attention(model, image, name, show_classes=not args.untrained)
    else:
        figure = draw_features(model, image, name, args.blocks)
    save_picture(figure, args.out)
    print(args.out)
