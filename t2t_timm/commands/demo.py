"""The demo, `python -m t2t_timm.commands.demo`: the embedded model reads real handwritten digits, without a network."""
import tempfile
from pathlib import Path

from ..digits import extract_heldout
from .classify import classify

__all__ = ['main']

MODEL = 'test_t2t_vit'
SHOWN = 12


def main() -> None:
    """Classify shipped images, print some answers and the accuracy over all of them, and say how to go on."""
    with tempfile.TemporaryDirectory() as tmp:
        results = list(classify([str(extract_heldout(Path(tmp) / 'heldout'))], MODEL, topk=3, batch_size=100))

    print(f"{'image':<18} {'label':<6} top 3 predictions")
    correct = 0
    for i, result in enumerate(results):
        file, best = Path(result['image']), result['classes']
        label = file.parent.name[2:]  # of a folder such as 3_three
        is_right = best[0]['label'] == label
        correct += is_right
        if i % -(-len(results) // SHOWN) == 0:
            predictions = '   '.join(f'{c["label"]:<5} {100 * c["probability"]:5.1f} %' for c in best)
            wrong = '' if is_right else '   wrong'
            print(f'{"/".join(file.parts[-2:]):<18} {label:<6} {predictions}{wrong}')
    print(f'\nHeld-out accuracy of {MODEL}: {100 * correct / len(results):.1f} % top-1 of {len(results)} images')
    print(
        "\nFor t2t_vit_14 with its published weights, in a script that imports nothing but timm: "
        "timm.create_model('t2t_vit_14', pretrained=True)"
    )


if __name__ == '__main__':
    main()
