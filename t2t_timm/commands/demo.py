"""The demo, `python -m t2t_timm.commands.demo`: the embedded model reads real handwritten digits, without a network."""
import tempfile
from pathlib import Path

import torch
from huggingface_hub.utils import tqdm
from timm.data import ImageDataset, create_dataset, create_loader, create_transform, resolve_data_config

from ..digits import extract_heldout
from ..models import T2TViT
from .load import load_t2t_vit

__all__ = ['heldout_top1', 'main', 'print_predictions']

MODEL = 'test_t2t_vit'
NUM_SHOWN = 12
BATCH_SIZE = 100


def print_predictions(model: T2TViT, dataset: ImageDataset, num_images: int = NUM_SHOWN) -> None:
    """Print a table of images spread over a dataset: image, label, the three likeliest classes."""
    names = model.pretrained_cfg['label_names']
    print(f"{'image':<18} {'label':<6} top 3 predictions")
    for index in range(0, len(dataset), -(-len(dataset) // num_images)):
        image, label = dataset[index]
        with torch.inference_mode():
            top = model(image[None]).softmax(dim=-1)[0].topk(3)
        rows = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        predictions = '   '.join(f'{names[i]:<5} {100 * p:5.1f} %' for i, p in rows)
        wrong = '' if top.indices[0] == label else '   wrong'
        print(f'{dataset.filename(index):<18} {names[label]:<6} {predictions}{wrong}')


def heldout_top1(model: torch.nn.Module, dataset: ImageDataset, **data_config) -> float:
    """Return the top-1 accuracy over a dataset in percent, showing progress.

    Args:
        model: Model, in evaluation mode.
        dataset: Dataset of images.
        **data_config: Preprocessing, of `resolve_data_config`.
    """
    loader = create_loader(
        dataset, batch_size=BATCH_SIZE, num_workers=0, use_prefetcher=False, device=torch.device('cpu'), **data_config)
    num_right = 0
    with torch.inference_mode(), tqdm(total=len(dataset), unit='image', leave=False, disable=None) as progress:
        for images, labels in loader:
            num_right += (model(images).argmax(dim=-1) == labels).sum().item()
            progress.update(len(labels))
    return 100 * num_right / len(dataset)


def main() -> None:
    """Classify shipped images, print the accuracy over all of them, and say how to go on."""
    model = load_t2t_vit(MODEL)
    data_config = resolve_data_config({}, model=model)
    with tempfile.TemporaryDirectory() as tmp:
        root = extract_heldout(Path(tmp) / 'heldout')
        dataset = create_dataset('', str(root))
        dataset.transform = create_transform(**data_config)
        print_predictions(model, dataset)
        top1 = heldout_top1(model, dataset, **data_config)
    print(f'\nHeld-out accuracy of {MODEL}: {top1:.1f} % top-1 of {len(dataset)} images')
    print(
        "\nFor t2t_vit_14 with its published weights, in a script that imports nothing but timm: "
        "timm.create_model('t2t_vit_14', pretrained=True)"
    )


if __name__ == '__main__':
    main()
