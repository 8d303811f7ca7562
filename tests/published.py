"""The golden generator's weights, written as each publisher writes them."""
import argparse
import json
import os
import pickle
import sys
import types
from collections import OrderedDict
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn as nn
from data import golden_weights as golden
from safetensors.torch import save_file

from t2t_timm.layers import sinusoidal_pos_embed

DATA = Path(__file__).parent / 'data'
LAYOUTS = json.loads((DATA / 'state_dict_layout.json').read_text())  # names, shapes, parameters, by architecture
ARGS = argparse.Namespace(model='t2t_vit_7', lr=1e-3, img_size=224, mean=None, crop_pct=None, interpolation='')


def layout(architecture: str) -> dict[str, list[int]]:
    """Return the official names and shapes."""
    return LAYOUTS[architecture]['state_dict']


@cache
def weights(architecture: str) -> dict[str, np.ndarray]:
    """Return the golden weights under the official names, float32; there is no pos_embed among them."""
    state = golden.deterministic_state(layout(architecture))
    return {name: value.astype(np.float32) for name, value in state.items()}


def tensors(architecture: str) -> 'OrderedDict[str, torch.Tensor]':
    """Return the golden weights as a torch model's state dict."""
    return OrderedDict((name, torch.tensor(value)) for name, value in weights(architecture).items())


def pos_embed(architecture: str) -> np.ndarray:
    """Return the sinusoidal table, (1, 1 + tokens, width): position p, channel i has the angle p / 10000^(2[i/2]/C)."""
    _, positions, width = layout(architecture)['pos_embed']
    table = np.arange(positions)[:, None] / np.power(10000, 2 * (np.arange(width) // 2) / width)
    table[:, 0::2], table[:, 1::2] = np.sin(table[:, 0::2]), np.cos(table[:, 1::2])
    return table[None].astype(np.float32)


def golden_model(architecture: str, regime: str = 'normal', dtype: torch.dtype = torch.float32, **kwargs) -> nn.Module:
    """Return a model with golden weights, rounded to float32, in evaluation mode."""
    model = timm.create_model(architecture, device='meta', **kwargs)  # draws no weights that would be replaced
    shapes = {k: v.shape for k, v in official(model.state_dict()).items()}
    state = {k: torch.from_numpy(v).float().to(dtype) for k, v in golden.deterministic_state(shapes, regime).items()}
    state['pos_embed'] = sinusoidal_pos_embed(*model.pos_embed.shape[1:], dtype=dtype)
    model.load_state_dict(state, assign=True)
    return model.eval()


def images(batch: int = 2, size: int = 224, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return golden images (batch, 3, size, size)."""
    return torch.from_numpy(golden.deterministic_images(batch, size)).to(dtype)


def logits(architecture: str) -> np.ndarray:
    """Return what the published implementation makes of them, float64."""
    return np.load(DATA / f'{architecture}.normal.npz')['logits']


def rel_error(actual, expected) -> float:
    """Return the largest difference over the largest magnitude expected."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    return np.abs(actual - expected).max() / np.abs(expected).max()


def tiny(**kwargs) -> dict[str, torch.Tensor]:
    """Return the state dict of a small model, the same each time."""
    torch.manual_seed(0)
    return timm.create_model('test_t2t_vit', **kwargs).state_dict()


def official(state_dict: dict[Any, Any]) -> dict[Any, Any]:
    """Return a state dict of the models under the official names, as the authors' files have them."""
    return {
        k.replace('patch_embed.', 'tokens_to_token.', 1) if isinstance(k, str) else k: v
        for k, v in state_dict.items()}


def paddle(state_dict: dict[Any, Any], names: str = 'official') -> dict[Any, Any]:
    """Return a state dict of the models as Paddle has it, linear weights transposed, or 'PaddleViT' names them."""
    state_dict = {
        k: v.t().contiguous() if k.endswith('.weight') and getattr(v, 'ndim', 0) == 2 else v
        for k, v in state_dict.items()}
    if names == 'official':
        return official(state_dict)
    return {
        k.replace('patch_embed.attention', 'patch_embed.attn').replace('patch_embed.project', 'patch_embed.proj'): v
        for k, v in state_dict.items()}


def prefixed(prefix: str, state_dict: dict[str, Any]) -> dict[str, Any]:
    return {prefix + k: v for k, v in state_dict.items()}


def zeros(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: torch.zeros_like(v) for k, v in state_dict.items()}


class Evil:
    """Asks whoever unpickles it to run a command."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def foreign(framework: str, architecture: str, transpose: bool) -> dict[str, np.ndarray]:
    """Return the weights under a framework's own names; its layout has the official order."""
    names = json.loads((DATA / 'foreign_layouts.json').read_text())[framework][architecture]
    values = dict(weights(architecture), pos_embed=pos_embed(architecture))
    state = OrderedDict()
    for (name, shape), official in zip(names.items(), layout(architecture), strict=True):
        value = values[official]
        if transpose and value.ndim == 2 and name.endswith('.weight'):
            value = np.ascontiguousarray(value.T)
        assert list(value.shape) == shape, name
        state[name] = value
    return state


def official_plain(path: Path) -> None:
    """A state dict and nothing else, in the file format of torch before 1.6."""
    torch.save(tensors('t2t_vit_7'), path, _use_new_zipfile_serialization=False)


def official_state_dict(path: Path) -> None:
    """A training checkpoint under distributed data parallel, without averaged weights."""
    state = OrderedDict((f'module.{k}', v) for k, v in tensors('t2t_vit_7').items())
    state['module.pos_embed'] = torch.from_numpy(pos_embed('t2t_vit_7'))
    torch.save({'epoch': 309, 'arch': 't2t_vit_7', 'state_dict': state, 'state_dict_ema': None, 'args': ARGS}, path)


def official_ema(path: Path) -> None:
    """A training checkpoint with averaged weights, which are the ones to take."""
    state = tensors('t2t_vit_7')
    torch.save({
        'epoch': 309,
        'arch': 't2t_vit_7',
        'state_dict': zeros(state),
        'state_dict_ema': state,
        'optimizer': {'state': {}, 'param_groups': [{'lr': 1e-3, 'betas': (0.9, 0.999)}]},
        'args': ARGS,
        'metric': np.float64(71.7),
    }, path)


def timm_train(path: Path) -> None:
    """What timm's own saver writes in train.py."""
    from timm.utils import CheckpointSaver, ModelEmaV3
    model = timm.create_model('t2t_vit_7')
    ema = ModelEmaV3(model)
    ema.module.load_state_dict(tensors('t2t_vit_7'), strict=False)
    saver = CheckpointSaver(
        model, torch.optim.SGD(model.parameters(), lr=1.), args=ARGS, model_ema=ema, checkpoint_dir=str(path.parent))
    saver._save(str(path), epoch=3, metric=12.5)


def token_labeling(path: Path) -> None:
    """A checkpoint with token labeling's auxiliary head."""
    state = tensors('t2t_vit_7')
    state['aux_head.weight'], state['aux_head.bias'] = torch.ones(1000, 256), torch.ones(1000)
    torch.save({'state_dict': state}, path)


def openmmlab(path: Path, ema: bool = False, **more: Any) -> None:
    """A checkpoint of mmcls's runner; with mmcv's EMAHook, after its swap, plain names are the averaged weights'."""
    state = OrderedDict((k, torch.from_numpy(v)) for k, v in foreign('openmmlab', 't2t_vit_t_14', False).items())
    if ema:
        state.update({f'ema_{k.replace(".", "_")}': torch.zeros_like(v) for k, v in state.items()})
    meta = dict(mmcls_version='0.17.0', CLASSES=['tench', 'goldfish'], config='model = dict()', epoch=305)
    torch.save({'meta': meta, 'state_dict': state} | more, path)


def mmpretrain(path: Path) -> None:
    """The same with mmengine's message hub, whose statistics hold numpy arrays and bound methods."""
    module = types.ModuleType('mmengine.logging.history_buffer')

    class HistoryBuffer:
        def __init__(self) -> None:
            self.history = np.arange(3.)
            self.methods = OrderedDict(min=self.min)

        def min(self) -> float:
            return self.history.min()

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, 'HistoryBuffer'
    module.HistoryBuffer = HistoryBuffer
    names = ('mmengine', 'mmengine.logging', module.__name__)
    sys.modules.update({name: types.ModuleType(name) for name in names[:2]}, **{module.__name__: module})
    try:
        openmmlab(path, message_hub={'log_scalars': {'train/loss': HistoryBuffer()}})
    finally:
        for name in names:
            del sys.modules[name]


def paddle_article(path: Path) -> None:
    """What paddle.save writes of a state dict: numpy arrays, and the parameters' other names."""
    state = foreign('paddle_article', 't2t_vit_7', True)
    state['StructuredToParameterName@@'] = {name: f'linear_{i}.w_0' for i, name in enumerate(state)}
    path.write_bytes(pickle.dumps(dict(state), protocol=4))


def paddlevit(path: Path, architecture: str = 't2t_vit_7', protocol: int = 2) -> None:
    """PaddleViT's names, as the older paddle.save (protocol 2) or the newer one wrote them."""
    path.write_bytes(pickle.dumps(foreign('paddlevit', architecture, True), protocol=protocol))


def safetensors(path: Path) -> None:
    """The official names in a safetensors file."""
    save_file(dict(tensors('t2t_vit_7')), path)


FORMATS = {  # name of the format: what writes it, the file's name, architecture, a word of how it is described
    'official, plain': (official_plain, '71.7_T2T_ViT_7.pth', 't2t_vit_7', 'before 1.6'),
    'official, state_dict': (official_state_dict, 'a.pth.tar', 't2t_vit_7', 'weights under state_dict'),
    'official, state_dict_ema': (official_ema, '71.7_T2T_ViT_7.pth.tar', 't2t_vit_7', 'leaving state_dict aside'),
    'timm train.py': (timm_train, 'last.pth.tar', 't2t_vit_7', 'of a timm training run'),
    'token labeling': (token_labeling, '84.2.pth.tar', 't2t_vit_7', 'auxiliary head of token labeling left out'),
    'OpenMMLab (mmcls)': (openmmlab, 'mm.pth', 't2t_vit_t_14', "OpenMMLab's names"),
    'OpenMMLab (EMAHook)': (partial(openmmlab, ema=True), 'ema.pth', 't2t_vit_t_14', "as mmcv's EMAHook leaves them"),
    'OpenMMLab (mmpretrain)': (mmpretrain, 'mm1.pth', 't2t_vit_t_14', "OpenMMLab's names"),
    'Paddle article': (paddle_article, 'a.pdparams', 't2t_vit_7', 'Paddle parameters; linear weights transposed'),
    'PaddleViT': (paddlevit, 'b.pdparams', 't2t_vit_7', "PaddleViT's names"),
    'PaddleViT, transformer tokens': (
        partial(paddlevit, architecture='t2t_vit_t_14', protocol=4), 'c.pdparams', 't2t_vit_t_14', "PaddleViT's names"),
    'safetensors': (safetensors, 'x.safetensors', 't2t_vit_7', 'safetensors'),
}
