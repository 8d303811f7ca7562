"""Errors and range of a model on a device, against the equations in float64 on the CPU.

Weights are the deterministic ones behind the golden tests (tests/data/golden_weights.py): products keep a trained
model's scale and norms and biases are not at their initial 1 and 0, which random initialisation would leave untested.
The float64 logits come from tests/reference.py, which shares no code with the package.
"""
import importlib.util
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Dict, Iterator, NamedTuple, Optional

import numpy as np
import timm
import torch


def load_module(path: str) -> ModuleType:
    """Return a module of the tests, which are no package."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, Path(__file__).resolve().parents[1] / 'tests' / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden_weights = load_module('data/golden_weights.py')
reference = load_module('reference.py')


class Precision(NamedTuple):
    """How a model is run, and how far its logits may be from float64's."""
    name: str
    threshold: Optional[float] = None
    amp: Optional[torch.dtype] = None  # of autocast
    dtype: torch.dtype = torch.float32  # of weights and images
    tf32: bool = True  # convolutions: PyTorch's default
    matmul: str = 'highest'  # PyTorch's default


PRECISIONS = [
    Precision('float32, no TF32', 1e-5, tf32=False),
    Precision("float32, PyTorch's default (TF32 convolutions)", 5e-3),
    Precision("float32, matmul precision 'high'", 1e-2, matmul='high'),
    Precision('float16 autocast', 1e-2, amp=torch.float16),
    Precision('bfloat16 autocast', 6e-2, amp=torch.bfloat16),
    Precision('pure bfloat16', 6e-2, dtype=torch.bfloat16),
]
HALF_PRECISIONS = PRECISIONS[-3:] + [Precision('pure float16', dtype=torch.float16)]


@contextmanager
def running_in(precision: Precision, device: torch.device) -> Iterator[None]:
    """Set PyTorch's switches, and set them back."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = precision.tf32
    torch.set_float32_matmul_precision(precision.matmul)
    try:
        with torch.autocast(device.type, precision.amp, enabled=precision.amp is not None):
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


def tf32_rounding(device: torch.device) -> Dict[str, float]:
    """Return how far TF32 moves a convolution and a matrix product on a device, relative; 0 is a device without it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 64, 56, 56, generator=generator).to(device)
    w = torch.randn(64, 64, 3, 3, generator=generator).to(device)
    runs = dict(convolution=lambda: torch.conv2d(x, w, padding=1), product=lambda: x.view(-1, 1024) @ x.view(1024, -1))
    rounded, exact = PRECISIONS[2], PRECISIONS[0]
    moved = {}
    for name, run in runs.items():
        with running_in(exact, device):
            expected = run()
        with running_in(rounded, device):
            moved[name] = ((run() - expected).norm() / expected.norm()).item()
    return moved


@lru_cache(maxsize=None)
def images(size: int, in_chans: int) -> Dict[str, torch.Tensor]:
    """Return normalized float32 images, name to (1, in_chans, size, size): those with flat regions, and noise."""
    noise = golden_weights.deterministic_images(1, size)
    column = np.arange(size).reshape(1, 1, 1, size)
    out = dict(golden_weights.flat_images(size), noise=noise)
    out['white, JPEG-like'] = out['white'] + np.round(0.5 * noise) / 255 / 0.226  # a level or two of 256
    out['bars above and below'] = noise.copy()
    out['bars above and below'][:, :, :size // 5] = out['bars above and below'][:, :, -(size // 5):] = -2.
    out['constant'] = np.full_like(noise, 2.2)
    out['fine stripes'] = 2.2 - 1e-2 * (column % 2) + 0 * noise
    out['broad stripes'] = 1. * (column // 16 % 2) + 1e-3 * noise
    out['ramp down'] = np.linspace(-2, 2, size).reshape(1, 1, size, 1) + 0 * noise
    out['one channel varies'] = np.concatenate([noise[:, :1], np.full_like(noise[:, 1:], 2.4)], axis=1)
    return {name: torch.from_numpy(x[:, :in_chans]).float() for name, x in out.items()}


@lru_cache(maxsize=None)
def _weights(name: str, in_chans: int, regime: str) -> Dict[str, torch.Tensor]:
    """Return weights under the official names, from which they are drawn."""
    model = timm.create_model(name, in_chans=in_chans)
    shapes = {k.replace('patch_embed.', 'tokens_to_token.', 1): tuple(v.shape) for k, v in model.state_dict().items()}
    state = {k: torch.from_numpy(v).float() for k, v in golden_weights.deterministic_state(shapes, regime).items()}
    return dict(state, pos_embed=model.pos_embed.detach())


def load(name: str, in_chans: int = 3, regime: str = 'normal', scale: float = 1.) -> torch.nn.Module:
    """Return a model with deterministic weights, keys and queries of its tokens-to-token module scaled; eval mode."""
    model = timm.create_model(name, in_chans=in_chans, device='meta').eval()
    state = {k: v.clone() for k, v in _weights(name, in_chans, regime).items()}
    for k, v in state.items():
        if k.startswith('tokens_to_token.') and ('.kqv.' in k or '.qkv.' in k):
            v[:2 * len(v) // 3] *= scale  # k, q, v in a Performer; q, k, v in a token transformer
    model.load_state_dict(state, strict=True, assign=True)
    return model


@lru_cache(maxsize=None)
def expected_logits(name: str, in_chans: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the float64 logits of all images; weights and images are rounded to `dtype` first."""
    model = load(name, in_chans).to(dtype)
    state = {k: v.double() for k, v in model.state_dict().items()}
    num_heads = model.blocks[0].attn.num_heads
    with torch.inference_mode():  # one by one: the plain equations form whole attention matrices
        return torch.cat([
            reference.t2t_vit(state, x.to(dtype).double(), num_heads)[1]
            for x in images(model.patch_embed.img_size[0], in_chans).values()])


def flat_images(name: str, in_chans: int, precision: Precision, device: torch.device) -> Dict[str, object]:
    """Return a row: each image's largest difference of a logit from float64's over the largest logit."""
    expected = expected_logits(name, in_chans, precision.dtype)
    model = load(name, in_chans).to(device, precision.dtype)
    x = images(model.patch_embed.img_size[0], in_chans)
    with torch.inference_mode(), running_in(precision, device):
        logits = model(torch.cat(list(x.values())).to(device, precision.dtype)).cpu().double()
    errors = ((logits - expected).abs().amax(dim=1) / expected.abs().amax(dim=1)).nan_to_num(torch.inf).tolist()
    worst = max(errors)
    return dict(
        model=name, in_chans=in_chans, precision=precision.name, threshold=precision.threshold, error=worst,
        image=list(x)[errors.index(worst)], passed=worst <= precision.threshold,
        other_class=(logits.argmax(dim=1) != expected.argmax(dim=1)).sum().item(),
        errors=dict(zip(x, errors, strict=True)))


def value_range(name: str, regime: str, precision: Precision, device: torch.device) -> Dict[str, object]:
    """Return a row: what is not finite where keys and queries are scaled, logits in eval mode and a training step."""
    found = {}
    for scale in (1, 3, 10):
        model = load(name, regime=regime, scale=scale).to(device, precision.dtype)
        x = torch.cat(list(images(model.patch_embed.img_size[0], 3).values())).to(device, precision.dtype)
        with running_in(precision, device):
            with torch.inference_mode():
                logits = model(x)
            trained = model.train()(x)
        trained.float().sum().backward()
        finite = {
            'logits': logits.isfinite().all(),
            'logits in training': trained.isfinite().all(),
            'gradients': torch.stack([p.grad.isfinite().all() for p in model.parameters()]).all(),
        }
        found[scale] = [what for what, all_finite in finite.items() if not all_finite]
    return dict(
        model=name, regime=regime, precision=precision.name, not_finite=found, passed=not any(found.values()))
