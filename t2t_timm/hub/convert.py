"""Conversion of a published checkpoint of any format into a directory that timm, Transformers and the Hub read."""
import json
import logging
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.data import ImageDataset, infer_imagenet_subset
from timm.data.readers.class_map import load_class_map
from timm.models import get_pretrained_cfg_value
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, save_config_for_hf
from timm.utils.misc import natural_key

from ..errors import UserError, printable, require_new_timm
from ..files import check_new_folder, new_folder
from ..models import T2TViT
from ..weights.checkpoint import Checkpoint, read_checkpoint
from ..weights.download import IntegrityError, check_file, file_hash
from ..weights.manifest import known_name, weight_entry
from .build import build, strict_state_dict
from .cards import architecture_card, tag_card

_logger = logging.getLogger(__name__)

__all__ = ['convert', 'write_config_and_card']


def convert(
        file: str | Path,
        model: str,
        out: str | Path,
        labels: str | Path | None = None,
        checked: bool = False,
        img_size: tuple[int, int] | None = None,
        key: str | None = None,
) -> Path:
    """Convert a checkpoint of any published format into a directory that timm loads as local-dir:DIR.

    The directory holds model.safetensors (float32), config.json and README.md, the model card. It appears whole or not
    at all: all is written beside it first.

    Args:
        file: Checkpoint; its format is recognised.
        model: Architecture, or architecture.tag if the file holds the weights of that tag.
        out: Directory to make, which is returned; may exist if it is empty.
        labels: Names of the classes of weights of one's own: the folder of class folders that they were trained on, or
            a text file with one name per line.
        checked: The file has been compared with the manifest already.
        img_size: Size (H, W) of the images that weights of one's own were trained with, if the file does not say it.
        key: Model to take if the file holds several, as 'teacher' or 'state_dict.backbone'.

    Raises:
        UserError: The file is not a readable checkpoint of that architecture, the names are not as many as its classes,
            or the directory is taken.
        OSError: There is no such file.
    """
    require_new_timm('Writing a config.json')  # older releases run what a class map in a pickle asks for
    file, out = Path(file), Path(out)
    name = known_name(model)
    check_new_folder(out)
    if labels is not None and name.tag:
        raise UserError(
            f'--labels names the classes of weights of your own, which have no tag: use --model {name.architecture}.')
    checkpoint = read_checkpoint(file, key)
    net = build(checkpoint, file, model, img_size)
    state_dict = strict_state_dict(checkpoint, net, file)
    origin = _compare_with_manifest(file, model) if name.tag and not checked else ''
    if not name.tag:
        net.pretrained_cfg['label_names'] = _label_names(Path(labels) if labels else None, checkpoint, file, net)
    _logger.info(printable('; '.join([f'{file.name}: {checkpoint.format}', *checkpoint.notes])))
    with new_folder(out) as folder:
        tensors = {k: v.detach().to(torch.float32, copy=True).contiguous() for k, v in state_dict.items()}
        # save_file() would make a file that nobody else may read, and raises errors of its own for a full disk.
        (folder / HF_SAFE_WEIGHTS_NAME).write_bytes(safetensors.torch.save(tensors, metadata={'format': 'pt'}))
        write_config_and_card(folder, net, origin)
    weights = out / HF_SAFE_WEIGHTS_NAME
    _logger.info(f'{weights.name}: {weights.stat().st_size} bytes, sha256 {file_hash(weights)}')
    return out


def _compare_with_manifest(file: Path, name: str) -> str:
    # What the card has to say of a file that could not be compared with the published one.
    try:
        has_hash = check_file(file, weight_entry(name).facts, name)
    except IntegrityError as e:
        raise IntegrityError(
            f'{e} It is not the published file: for weights of your own use --model {known_name(name).architecture}.'
        ) from e
    return '' if has_hash else (
        f'Converted from a file {file.name} of {file.stat().st_size} bytes, SHA-256 {file_hash(file)}. No hash of the '
        'published file is known, so it could not be compared.')


def _label_names(labels: Path | None, checkpoint: Checkpoint, file: Path, model: T2TViT) -> list[str] | None:
    """Return the names of the classes: those given, or those of the record if they are as many as the classes."""
    names, count = checkpoint.record.label_names, model.num_classes
    if labels is not None:
        names = _folder_names(labels, checkpoint) if labels.is_dir() else _listed_names(labels)
        if len(names) != count:
            raise UserError(f'{labels} should name the {count} classes of {file}, but it names {len(names)}.')
    elif names and len(names) != count:
        checkpoint.notes.append(
            f'{checkpoint.record.sources["label_names"]} names {len(names)} classes, the weights have {count}: names '
            'left out')
        names = None
    if count and not names and infer_imagenet_subset(model) is None:
        _logger.info('The classes have no names: --labels FOLDER|FILE gives them.')
    return names


def _folder_names(labels: Path, checkpoint: Checkpoint) -> list[str]:
    """Return the names of a folder's class folders, numbered as the run's class map or train.py numbers them."""
    class_map = checkpoint.record.class_map
    if class_map:
        try:
            numbers = load_class_map(class_map, str(labels))
            return [str(name) for name in sorted(numbers, key=numbers.__getitem__)]
        except Exception as e:  # timm asserts; a class map in a pickle may hold anything
            raise UserError(
                f'The run numbered its classes by --class-map {class_map}, which cannot be read ({e}): put it into '
                f'{labels}, or give a text file with one class name per line, in that order.') from e
    try:
        names = list(ImageDataset(str(labels)).reader.class_to_idx)  # numbered as train.py numbers them
    except RuntimeError:
        names = []
    if not names or '' in names:  # images that lie in no folder of their own have the class ''
        raise UserError(f'{labels} should hold a folder of images for each class.')
    ties = [pair for pair in zip(names, names[1:], strict=False) if natural_key(pair[0]) == natural_key(pair[1])]
    if ties:
        raise UserError(
            f'timm numbers the classes {ties[0][0]!r} and {ties[0][1]!r} of {labels} in either order, differently in '
            'each run: give a text file with one class name per line, in the order of the classes.')
    if names != sorted(names) and not checkpoint.record.timm_order:
        checkpoint.notes.append(
            f"classes numbered as timm's train.py numbers folders ({', '.join(names[:3])} ...): if another program "
            f"trained the model, as torchvision's ImageFolder ({', '.join(sorted(names)[:3])} ...), give a text file")
    return names


def _listed_names(labels: Path) -> list[str]:
    try:
        names = [line.strip() for line in labels.read_text(encoding='utf-8-sig').splitlines()]
    except UnicodeDecodeError as e:
        raise UserError(f'{labels} is not a text file in UTF-8: it should have one class name per line.') from e
    if not all(name and name.isprintable() for name in names) or len(set(names)) < len(names):
        raise UserError(f'{labels} should have one class name per line, each once, in printable characters.')
    return names


def write_config_and_card(folder: Path, model: T2TViT, origin: str = '') -> None:
    """Write a model's config.json and README.md, the model card, into a folder; `origin` is as for `tag_card`.

    The model may be on the meta device; its pretrained cfg has the preprocessing.
    """
    require_new_timm('Writing a config.json')
    cfg, path = model.pretrained_cfg, folder / 'config.json'
    label_names = cfg.get('label_names')
    save_config_for_hf(model, str(path), model_config={'label_names': list(label_names)} if label_names else None)
    # timm writes every argument that it knows. Transformers passes num_classes itself, and trips over a second one; it
    # does not read pretrained_cfg, and needs what differs from the architecture's defaults.
    config = json.loads(path.read_text(encoding='utf-8'))
    size: Any = get_pretrained_cfg_value(cfg['architecture'], 'input_size')
    usual = dict(in_chans=size[0], img_size=list(size[1:]), global_pool='token')
    # An empty entry is written too: Transformers saves null for what is missing, which timm cannot read.
    config['model_args'] = {
        k: v for k, v in config['model_args'].items() if k != 'num_classes' and usual.get(k) != v}
    path.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8', newline='\n')
    card = tag_card(f'{cfg["architecture"]}.{cfg["tag"]}', origin) if cfg.get('tag') else architecture_card(
        cfg['architecture'], model.num_classes, cfg['input_size'], label_names or ())
    (folder / 'README.md').write_text(card, encoding='utf-8', newline='\n')
