"""The picture of README.md, a held-out digit and what test_t2t_vit answers: python tools/plot_answer.py FILE.png"""
import sys
import tempfile
from pathlib import Path

import timm
import torch
from matplotlib.figure import Figure
from PIL import Image

from t2t_timm.digits import extract_heldout

DIGIT = '3_three/1509.png'


def answer(image: Image.Image) -> dict[str, float]:
    """Return the probability of each class, the most probable first."""
    model = timm.create_model('test_t2t_vit', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        probabilities = model(transform(image)[None]).softmax(dim=1)[0].tolist()
    names = model.pretrained_cfg['label_names']
    return dict(sorted(zip(names, probabilities, strict=True), key=lambda item: -item[1]))


def draw(file: str) -> None:
    """Write the picture as a PNG file."""
    with tempfile.TemporaryDirectory() as tmp:
        image = Image.open(extract_heldout(Path(tmp) / 'digits') / DIGIT).convert('RGB')
    figure = Figure(figsize=(6, 1.9), dpi=100, layout='constrained')
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.6))
    left.imshow(image)
    left.set_axis_off()
    names, probabilities = zip(*list(answer(image).items())[:4], strict=True)
    bars = right.barh(names, probabilities, color=['#d62728'] + ['#bbbbbb'] * 3)
    right.bar_label(bars, fmt='%.3f', padding=4)
    right.invert_yaxis()
    right.set_xlim(0, 1.1)
    right.set_xticks([])
    right.tick_params(length=0)
    right.spines[:].set_visible(False)
    figure.savefig(file)


if __name__ == '__main__':
    draw(sys.argv[1])
