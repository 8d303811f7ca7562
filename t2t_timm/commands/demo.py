"""The demo, `python -m t2t_timm.commands.demo`: the embedded model reads real handwritten digits, without a network."""
import tempfile
from pathlib import Path

import torch
from timm.data import create_dataset, create_loader, resolve_data_config

from ..digits import extract_heldout
from .load import load_t2t_vit

__all__ = ['main']

MODEL = 'test_t2t_vit'
SHOWN = 12
BATCH_SIZE = 100


def main() -> None:
    """Classify shipped images, print some answers and the accuracy over all of them, and say how to go on."""
    model = load_t2t_vit(MODEL)
    names = model.pretrained_cfg['label_names']
    with tempfile.TemporaryDirectory() as tmp:
        dataset = create_dataset('', str(extract_heldout(Path(tmp) / 'heldout')))
        loader = create_loader(
            dataset, batch_size=BATCH_SIZE, num_workers=0, use_prefetcher=False, device=torch.device('cpu'),
            **resolve_data_config({}, model=model))
        with torch.inference_mode():
            results = [(model(images).softmax(dim=1), labels) for images, labels in loader]
    probabilities, labels = (torch.cat(parts) for parts in zip(*results, strict=True))

    print(f"{'image':<18} {'label':<6} top 3 predictions")
    for index in range(0, len(labels), -(-len(labels) // SHOWN)):
        values, classes = (t.tolist() for t in probabilities[index].topk(3))
        predictions = '   '.join(f'{names[i]:<5} {100 * p:5.1f} %' for i, p in zip(classes, values, strict=True))
        wrong = '' if classes[0] == labels[index] else '   wrong'
        print(f'{dataset.filename(index):<18} {names[labels[index]]:<6} {predictions}{wrong}')
    top1 = 100 * (probabilities.argmax(dim=1) == labels).float().mean()
    print(f'\nHeld-out accuracy of {MODEL}: {top1:.1f} % top-1 of {len(labels)} images')
    print(
        "\nFor t2t_vit_14 with its published weights, in a script that imports nothing but timm: "
        "timm.create_model('t2t_vit_14', pretrained=True)"
    )


if __name__ == '__main__':
    main()
