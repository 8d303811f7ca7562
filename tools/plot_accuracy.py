"""The plot of README.md, ImageNet top-1 against multiply-accumulates: python tools/plot_accuracy.py FILE.png"""
import sys

import timm
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode

from t2t_timm.hub.complexity import known_complexity
from t2t_timm.weights.manifest import load_manifest

# All were trained on ImageNet-1k alone, for 300 epochs or ten more at 224 x 224, without a teacher.
FAMILY = {
    'T2T-ViT': ('t2t_vit_7', 't2t_vit_10', 't2t_vit_12', 't2t_vit_14', 't2t_vit_19', 't2t_vit_24'),
    'T2T-ViT_t': ('t2t_vit_t_14', 't2t_vit_t_19', 't2t_vit_t_24'),
}
# The top-1 accuracies are those of timm's results/results-imagenet.csv, release 1.0.31.
DEIT = {'deit_tiny_patch16_224': 72.190, 'deit_small_patch16_224': 79.856, 'deit_base_patch16_224': 81.980}
# These labels would lie on another; they are moved by so many points.
OFFSETS = {
    'DeiT tiny': (4, -11), 'DeiT small': (4, -11), 'DeiT base': (6, -28), '19': (4, -13), '24': (-2, -14),
    't_14': (2, -13),
}


def count_macs(name: str) -> int:
    """Return the multiply-accumulates of one image in a model of timm."""
    model = timm.create_model(name, device='meta').eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *model.pretrained_cfg['input_size'], device='meta'))
    return counter.get_total_flops() // 2


def points() -> dict[str, list[tuple[str, float, float]]]:
    """Return name, multiply-accumulates in 10^9 and top-1 in percent of the models of each family."""
    weights, cost = load_manifest()['weights'], known_complexity()
    found = {
        family: [(n, cost[f'{n}.in1k'].macs / 1e9, weights[f'{n}.in1k'].top1) for n in names]
        for family, names in FAMILY.items()}
    return {**found, 'DeiT': [(name, count_macs(name) / 1e9, top1) for name, top1 in DEIT.items()]}


def draw(file: str) -> None:
    """Write the plot as a PNG file."""
    figure = Figure(figsize=(7.5, 4.2), dpi=120, layout='constrained')
    axis = figure.subplots()
    style = {'T2T-ViT': ('#d62728', 'o-'), 'T2T-ViT_t': ('#e08214', 'o-'), 'DeiT': ('#7f7f7f', 's--')}
    for family, models in points().items():
        color, line = style[family]
        axis.plot([m for _, m, _ in models], [t for *_, t in models], line, color=color, label=family)
        for name, macs, top1 in models:
            text = name.removeprefix('t2t_vit_').removesuffix('_patch16_224').replace('deit_', 'DeiT ')
            x, y = OFFSETS.get(text, (-5, 6))
            axis.annotate(
                f'{text}: {top1:.1f}', (macs, top1), fontsize=8, color=color, xytext=(x, y),
                textcoords='offset points', ha='right' if x < 0 or text == 'DeiT base' else 'left')
    axis.set_xscale('log')
    axis.set_xticks([1, 2, 5, 10, 20], ['1', '2', '5', '10', '20'])
    axis.set_xlim(0.8, 22)
    axis.set_ylim(70.5, 84)
    axis.minorticks_off()
    axis.set_xlabel('multiply-accumulates of one 224 x 224 image (G)')
    axis.set_ylabel('ImageNet-1k top-1 (%)')
    axis.grid(alpha=0.3)
    axis.legend(loc='lower right')
    figure.savefig(file)


if __name__ == '__main__':
    draw(sys.argv[1])
