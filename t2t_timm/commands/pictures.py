"""Pictures of what a model looks at: its attention, and the maps of its channels (paper figure 2)."""
import logging
import textwrap
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from ..errors import UserError
from ..files import new_file
from ..layers import TokenPerformer, TokenTransformer, soft_split, soft_split_size
from ..models import T2TViT
from .classify import class_names
from .images import ImageReader, open_image

__all__ = [
    'Attention', 'draw_attention', 'draw_features', 'extract_attention', 'read_image', 'save_picture', 'step_attention',
]

_logger = logging.getLogger(__name__)

MAX_SIZE = 1024  # pixels of a picture of attention; a block's matrix is then 4,097 x 4,097
COLUMNS = 6  # panels in a row, beside the colour bar
PANEL = 2.  # inches
QUERIES = ((0.25, 0.25), (0.5, 0.5), (0.75, 0.75))  # tokens of a token step, as fractions of height and width
CLASSES = 5


class Attention(NamedTuple):
    """Attention over one image."""
    blocks: list[np.ndarray]  # attention of the class token over the grid, mean over the heads, (H', W') for each block
    rollout: np.ndarray  # the same followed through all blocks
    steps: list[list[tuple[tuple[int, int], np.ndarray, float]]]  # for each token step: queries, maps, what is kept
    probabilities: np.ndarray  # for each class, (num_classes,); empty without a classifier


def read_image(file: str, model: T2TViT) -> Image.Image:
    """Read an image as the model sees it: its colour channels, centre-cropped and resized to its image size.

    Raises:
        UserError: The model reads neither 1 nor 3 channels.
        ValueError: The file does not exist or is not an image.
    """
    image = open_image(file).convert(ImageReader(model).mode)
    height, width = model.patch_embed.img_size
    ratio = image.width * height / (image.height * width)
    if not 0.99 < ratio < 1 / 0.99:
        _logger.info(
            f'{file}: the picture shows the middle {min(ratio, 1 / ratio):.0%} of its '
            f'{"width" if ratio > 1 else "height"}, since the model reads {height} x {width} pixels (height x width).')
    return ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)


def _to_input(image: Image.Image, model: T2TViT) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image)).reshape(1, *model.patch_embed.img_size, model.in_chans)
    return ImageReader(model).normalize(pixels.permute(0, 3, 1, 2).to(next(model.parameters()).device))


def step_attention(
        step: TokenPerformer | TokenTransformer,
        x: torch.Tensor,
        queries: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention of some queries of a token step over its tokens, (Q, N), and what is kept of it, (Q,).

    The Performer never forms it; it is what its random features stand for: phi(q) phi(k)' over its sum. The sum has
    1e-8 added in the model, which keeps sum / (sum + 1e-8) of it.
    """
    tokens = step.norm1(soft_split(x, *step.split))[0]
    if isinstance(step, TokenTransformer):
        q, k, _ = step.attn.qkv(tokens).cpu().chunk(3, dim=-1)
        return (q[queries] @ k.T * step.attn.scale).softmax(dim=-1), torch.ones(len(queries))
    k, q, _ = step.kqv(tokens).cpu().double().chunk(3, dim=-1)  # some devices have no float64
    w = step.w.cpu().double()
    k, q = (t @ w.T - t.square().sum(dim=-1, keepdim=True) / 2 for t in (k, q[queries]))  # log phi, but for 1 / sqrt(m)
    logs = torch.logsumexp(k + q[:, None], dim=-1)  # large norms would leave the range of exp
    total = torch.logsumexp(logs, dim=-1).exp() / len(w)
    return logs.softmax(dim=-1), total / (total + step.eps)


@torch.no_grad()
def extract_attention(model: T2TViT, image: Image.Image) -> Attention:
    """Run a model on an image and return its attention.

    The rollout follows the class token through the blocks, each 0.5 (attention + identity) ("Quantifying Attention Flow
    in Transformers", arXiv 2005.00928).

    Args:
        model: Model; its blocks compute their attention unfused from here on.
        image: Image that read_image gave.
    """
    matrices, inputs = [], []
    steps = [m for m in model.patch_embed.children() if isinstance(m, TokenPerformer | TokenTransformer)]
    block: Any
    with ExitStack() as hooks:
        for block in model.blocks:
            if hasattr(block, 'attn'):
                block.attn.fused_attn = False
                hooks.enter_context(block.attn.attn_drop.register_forward_hook(
                    lambda m, args, out: matrices.append(out[0].mean(dim=0).cpu())))
        for step in steps:
            hooks.enter_context(step.register_forward_pre_hook(lambda m, args: inputs.append(args[0])))
        logits = model(_to_input(image, model))

    rollout = torch.zeros(len(matrices[0]))
    rollout[0] = 1.
    for matrix in reversed(matrices):
        rollout = 0.5 * (rollout @ matrix + rollout)
    rows = [rollout] + [m[0] for m in matrices]
    maps = [row[model.num_prefix_tokens:].reshape(model.patch_embed.grid_size).numpy() for row in rows]
    step_maps = []
    for step, x in zip(steps, inputs, strict=True):
        height, width = (soft_split_size(s, *step.split) for s in x.shape[-2:])
        points = [(int(height * y), int(width * x)) for y, x in QUERIES]
        attention, kept = step_attention(step, x, torch.tensor([y * width + x for y, x in points]))
        maps_of_step = attention.reshape(-1, height, width).numpy()
        step_maps.append(list(zip(points, maps_of_step, kept.tolist(), strict=True)))
    probabilities = logits[0].softmax(dim=0).cpu().numpy() if model.num_classes else np.zeros(0)
    return Attention(maps[1:], maps[0], step_maps, probabilities)


def _new_figure(rows: list[int], image: Image.Image, title: str):
    """Return a matplotlib Figure and a part of it for each section; a section has some rows of panels."""
    from matplotlib.figure import Figure
    row = PANEL * min(image.height / image.width, 1.5) + 0.4
    heights = [row * n + 0.5 for n in rows]
    figure = Figure(figsize=(PANEL * (COLUMNS + 1), sum(heights) + 0.4), dpi=100, layout='constrained')
    figure.suptitle(f'{title}, {image.height} x {image.width} pixels', fontsize=14)
    return figure, figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]


def _show(axis, values: np.ndarray, title: str, image: Image.Image, interpolation: str = 'nearest', **kwargs):
    from matplotlib.patches import Rectangle
    # every map lies in the image's coordinates, whatever its grid
    axis.set_title(title, fontsize=10, y=1.)  # otherwise matplotlib measures ticks to place it
    # An image on white has no edge without a frame.
    axis.add_patch(Rectangle((0, 0), image.width, image.height, fill=False, edgecolor='0.7', zorder=3))
    return axis.imshow(values, extent=(0, image.width, image.height, 0), interpolation=interpolation, **kwargs)


def _show_image(axis, image: Image.Image) -> None:
    _show(axis, np.asarray(image), 'image', image, cmap='gray', vmin=0, vmax=255)


def _show_over(axis, image: Image.Image, values: np.ndarray, title: str, top: float):
    """Draw a map over the image in grey, in yellow to red where it is above 1, its average if attention is uniform."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    colors = colormaps['autumn_r'](np.linspace(0, 1, 256))
    colors[:, 3] = 0.8 * np.linspace(0, 1, 256) ** 0.5
    # The image is drawn in middle greys, since the colours could not be seen on black or on white.
    _show(axis, np.asarray(image.convert('L')), title, image, cmap='gray', vmin=-128, vmax=300)
    return _show(axis, values, title, image, 'bicubic', cmap=ListedColormap(colors), vmin=1, vmax=max(top, 2))


def _panels(figure, title: str, rows: int = 1) -> np.ndarray:
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(rows, COLUMNS + 1, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    return axes


def _color_bar(figure, axis, shown, label: str, **kwargs) -> None:
    # in the cell right of the last map
    bar = figure.colorbar(shown, cax=axis.inset_axes((0.05, 0., 0.08, 0.95)), **kwargs)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=9)


def _show_section(figure, image: Image.Image, title: str, maps: list) -> None:
    """Draw titled maps of one section with one colour bar, in units of uniform attention."""
    axes = _panels(figure, title, _rows(maps))
    values = [m * m.size for _, m, _ in maps]
    top = max(np.quantile(v, 0.995) for v in values)
    for axis, (name, _, point), value in zip(axes[:, :COLUMNS].flat, maps, values, strict=False):
        shown = _show_over(axis, image, value, name, top)
        if point is not None:
            y, x = ((p + 0.5) * s / n for p, s, n in zip(point, image.size[::-1], value.shape, strict=True))
            axis.plot(x, y, marker='o', markersize=8, color='none', markeredgecolor='blue', markeredgewidth=2)
    _color_bar(figure, axes[0, min(len(maps), COLUMNS)], shown, 'times the average', extend='max')


def _rows(maps: list) -> int:
    return -(-len(maps) // COLUMNS)


def _show_classes(figure, axes: np.ndarray, probabilities: np.ndarray, labels: list[str]) -> None:
    """Draw the most probable classes as bars, with the label on the bar, over the cells of some panels."""
    first = axes[0].get_subplotspec()
    axis = figure.add_subplot(first.get_gridspec()[0, first.colspan.start:])
    axis.set_title('most probable classes', fontsize=10)
    axis.set_axis_off()
    best = np.argsort(-probabilities, kind='stable')[:CLASSES]
    for y, i in enumerate(best):
        axis.barh(y, 1, height=0.8, color='0.95')
        axis.barh(y, probabilities[i], height=0.8, color='#9ecae1')
        axis.text(0.01, y, textwrap.shorten(labels[i], 44, placeholder=' ...'), fontsize=10, va='center')
        axis.text(0.99, y, f'{100 * probabilities[i]:.1f} %', fontsize=10, va='center', ha='right')
    axis.set(xlim=(0, 1), ylim=(CLASSES - 0.4, -0.6))


def draw_attention(model: T2TViT, image: Image.Image, name: str, show_classes: bool = True):
    """Draw the most probable classes, the class token's attention in each block, its rollout, and that of token steps.

    A token step's map is left out where the Performer uses less than half of it.

    Args:
        model: Model to draw.
        image: Image that read_image gave.
        name: What the title calls the model.
        show_classes: Show the most probable classes, if the model has any.

    Returns:
        A matplotlib Figure.

    Raises:
        UserError: The image is larger than MAX_SIZE.
    """
    if max(image.size) > MAX_SIZE:
        raise UserError(f'Pictures of attention go up to {MAX_SIZE} x {MAX_SIZE} pixels: use a smaller --img-size.')
    attention = extract_attention(model, image)
    blocks: list[tuple[str, np.ndarray, Any]] = [(f'block {i}', m, None) for i, m in enumerate(attention.blocks, 1)]
    steps = []
    for i, step in enumerate(attention.steps, 1):
        drawn = [(f'step {i}, {m.shape[0]} x {m.shape[1]}', m, point) for point, m, kept in step if kept >= 0.5]
        if not drawn:
            _logger.info(
                f'Step {i} is not drawn: its attention has little effect on this image, as less than half of it '
                'reaches what the model computes next.')
        steps += drawn
    sections = [('Attention of the class token, mean over the heads', blocks)]
    if steps:
        sections.append(('Attention inside the tokens-to-token module, of the tokens circled', steps))
    figure, (first, *parts) = _new_figure([1, *(_rows(maps) for _, maps in sections)], image, name)
    axes = _panels(first, 'Image, and attention of the class token followed through all blocks (rollout)')[0]
    _show_image(axes[0], image)
    rollout = attention.rollout * attention.rollout.size
    shown = _show_over(axes[1], image, rollout, 'rollout', rollout.max())
    _color_bar(first, axes[2], shown, 'times the average')
    if attention.probabilities.size and show_classes:
        _show_classes(first, axes[3:], attention.probabilities, class_names(model))
    for part, (title, maps) in zip(parts, sections, strict=True):
        _show_section(part, image, title, maps)
    return figure


@torch.no_grad()
def draw_features(model: T2TViT, image: Image.Image, name: str, blocks: list[int] | None = None):
    """Draw the maps of the channels that vary most: of soft-split stages 1 and 2 and of some blocks.

    Args:
        model: Model to draw.
        image: Image that read_image gave.
        name: What the title calls the model.
        blocks: Numbers of the blocks, from 1; by default the first, the middle and the last.

    Returns:
        A matplotlib Figure.

    Raises:
        UserError: There is no such block.
    """
    depth = len(model.blocks)
    blocks = blocks or sorted({1, (depth + 1) // 2, depth})
    if not all(1 <= b <= depth for b in blocks):
        raise UserError(f'The model has blocks 1 to {depth}, not {", ".join(map(str, blocks))}.')
    x = _to_input(image, model)
    levels = model.patch_embed.maps(x, 2)
    levels += model.get_intermediate_layers(x, [b - 1 for b in blocks], reshape=True)
    titles = ['soft-split stage 1', 'soft-split stage 2'] + [f'block {b}' for b in blocks]
    figure, parts = _new_figure([1] * len(levels), image, f'Channels that vary most: {name}')
    for part, title, level in zip(parts, titles, levels, strict=True):
        flat = level[0].flatten(1).cpu().double()
        std, mean = torch.std_mean(flat, dim=1, keepdim=True)
        channels = std[:, 0].topk(min(COLUMNS - 1, len(flat))).indices.tolist()
        maps = ((flat - mean) / std.clamp(min=1e-12)).reshape(level.shape[1:]).numpy()
        axes = _panels(part, f'{title}: {level.shape[1]} channels of {level.shape[2]} x {level.shape[3]}')[0]
        _show_image(axes[0], image)
        for axis, channel in zip(axes[1:], channels, strict=False):
            shown = _show(axis, maps[channel], f'channel {channel}', image, cmap='viridis', vmin=-3, vmax=3)
        _color_bar(part, axes[1 + len(channels)], shown, 'std. from mean', extend='both')
    return figure


def save_picture(figure, path: str | Path) -> None:
    """Write a matplotlib Figure as PNG; the file appears whole or not at all."""
    with new_file(Path(path)) as part:
        figure.savefig(part, format='png')
