"""Mutated checkpoints of every format, of a small model: bytes, zip members, pickle opcodes, and what was saved."""
import argparse
import io
import json
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import published
import torch
from safetensors.torch import save as save_safetensors

from .data import mutate_bytes, mutate_json, number, word

LARGEST = 16 << 20  # bytes; some formats write out what others say in strides


def _torch(saved: Any, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(saved, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def _openmmlab(state: dict[str, Any]) -> bytes:
    renamed = OrderedDict()
    for name, value in published.official(state).items():
        for ours, theirs in (
                ('blocks.', 'encoder.'), ('.norm', '.ln'), ('.mlp.fc1.', '.ffn.layers.0.0.'),
                ('.mlp.fc2.', '.ffn.layers.1.'),
        ):
            name = name.replace(ours, theirs)
        renamed['head.layers.' + name if name.startswith('head.') else 'backbone.' + name] = value
    meta = dict(mmcls_version='0.17.0', CLASSES=['tench'], epoch=305, loss=np.arange(3.))
    return _torch({'meta': meta, 'state_dict': renamed, 'message_hub': {'lr': np.float64(1)}})


def _timm_run(state: dict[str, Any]) -> bytes:
    args = argparse.Namespace(model='test_t2t_vit', img_size=56, mean=None, std=[.5], crop_pct=.9, interpolation='')
    return _torch({
        'epoch': 3, 'arch': 'test_t2t_vit', 'state_dict': {f'module.{k}': v for k, v in state.items()},
        'state_dict_ema': OrderedDict(state), 'optimizer': {'param_groups': [{'lr': 1e-3}]}, 'args': args,
        'metric': np.float64(71.7)})


def _paddle(state: dict[str, Any], protocol: int, names: str = 'official') -> bytes:
    params = {
        name: value.numpy() if isinstance(value, torch.Tensor) else value
        for name, value in published.paddle(state, names).items()}
    if names == 'official':
        params['StructuredToParameterName@@'] = {name: f'linear_{i}.w_0' for i, name in enumerate(state)}
    return pickle.dumps(params, protocol=protocol)


FORMATS = {  # what turns a state dict into a file's bytes
    'PyTorch': lambda state: _torch(published.official(state)),
    'PyTorch legacy': lambda state: _torch(published.official(state), zipped=False),
    'PyTorch legacy, wrapped': lambda state: _torch({'state_dict': state, 'epoch': 1}, zipped=False),
    'timm training run': _timm_run,
    'OpenMMLab': _openmmlab,
    'Paddle': lambda state: _paddle(state, 4),
    'Paddle, protocol 5': lambda state: _paddle(state, 5),
    'PaddleViT': lambda state: _paddle(state, 2, 'PaddleViT'),
    'safetensors': lambda state: save_safetensors({k: v for k, v in state.items() if isinstance(v, torch.Tensor)}),
}


@lru_cache
def _state() -> dict[str, torch.Tensor]:
    return published.tiny(num_classes=10)


@lru_cache
def whole_file(fmt: str) -> bytes:
    return FORMATS[fmt](_state())


# ---------------------------------------------------------------- what was saved

def _senseless(rng: Random, tensor: torch.Tensor) -> Any:
    """Return another thing in place of a tensor: of another shape, type or kind, or no tensor."""
    size = rng.choice((0, 1, 2, 49, 147, 1000))
    few = torch.zeros(rng.choice((1, 2, 64)))
    return rng.choice((
        lambda: torch.zeros(rng.choice(((), (size,), (size, 1), (1, size, 64), (1, size + 1, 64), (1, 1, 1, 1, size)))),
        lambda: few[:1].expand(rng.choice(((2**20, 2**20), (2**30, 64), (1, 2**24 + 1, 64), (2**62,), (2**28,)))),
        lambda: few[:1].expand(rng.choice((2**22, 2**24)), tensor.shape[-1] if tensor.ndim else 1),
        lambda: tensor.to(rng.choice((
            torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool,
            torch.complex64, torch.float8_e4m3fn, torch.uint16, torch.uint64))),
        lambda: torch.full_like(tensor, rng.choice((float('nan'), float('inf'), -3e38))),
        lambda: torch.quantize_per_tensor(tensor.float(), .1, 0, torch.qint8),
        lambda: tensor.float().to_sparse(),
        lambda: torch.empty(rng.choice(((8,), (2**50,), tuple(tensor.shape))), device='meta'),
        lambda: torch.nested.nested_tensor([few, few]),
        lambda: torch.nn.Parameter(tensor.float()),
        lambda: tensor.t() if tensor.ndim == 2 else tensor.unsqueeze(0),
        lambda: rng.choice((None, number(rng), word(rng), [], {}, {'a': tensor}, np.ones(3), np.array(['a'], object))),
    ))()


def _resaved(rng: Random, fmt: str) -> bytes:
    state = dict(_state())
    for _ in range(rng.choice((1, 1, 2, 4))):
        # the ones whose shape the checkpoint decides are the interesting ones
        name = rng.choice((
            rng.choice(list(state) or ['x']), 'head.weight', 'pos_embed', 'patch_embed.attention1.kqv.weight'))
        kind = rng.randrange(6)
        if kind == 0:
            state.pop(name, None)
        elif kind == 1:
            state[rng.choice((
                word(rng), number(rng), (name,), None, f'aux_{name}', f'module.{name}', 'tokens_to_token.x',
                'patch_embed.x'))] = torch.ones(2)
        elif kind == 2:
            wrapper = rng.choice(('model', 'state_dict', 'state_dict_ema', 'net', 'teacher', 'args', 'arch', 'a'))
            state = {wrapper: state, rng.choice(('epoch', 'student', 'message_hub')): rng.choice((word(rng), _state()))}
        else:
            value = state.get(name)
            state[name] = _senseless(rng, value if isinstance(value, torch.Tensor) else torch.ones(2, 2))
    return FORMATS[fmt](state)


# ---------------------------------------------------------------- pickles

_GLOBALS = (
    ('os', 'system'), ('posix', 'system'), ('builtins', 'eval'), ('builtins', 'getattr'), ('__builtin__', 'eval'),
    ('builtins', 'bytearray'), ('builtins', 'tuple'), ('builtins', 'bytes'), ('torch', 'load'), ('torch.hub', 'load'),
    ('torch', 'Tensor'), ('torch', 'FloatStorage'), ('torch._utils', '_rebuild_tensor_v2'), ('torch', 'device'),
    ('torch._utils', '_rebuild_parameter'), ('torch._utils', '_rebuild_sparse_tensor'),
    ('torch._utils', '_rebuild_meta_tensor_no_storage'), ('torch._tensor', '_rebuild_from_type_v2'),
    ('collections', 'OrderedDict'), ('collections', 'Counter'), ('argparse', 'Namespace'), ('_codecs', 'encode'),
    ('numpy', 'ndarray'), ('numpy', 'dtype'), ('numpy.core.multiarray', '_reconstruct'),
    ('numpy.core.multiarray', 'scalar'), ('numpy.core.numeric', '_frombuffer'), ('shutil', 'rmtree'),
    ('mmengine.logging.history_buffer', 'HistoryBuffer'), ('t2t_timm.files', 'new_folder'), ('x' * 200, 'y.z'),
)
_CALL = b'(S"touch executed"\ntR'


def _global(rng: Random) -> bytes:
    module, name = rng.choice(_GLOBALS)
    return f'c{module}\n{name}\n'.encode()


def _text(text: str) -> bytes:
    data = text.encode('utf-8', 'surrogatepass')
    return b'X' + struct.pack('<I', len(data)) + data


def _int(value: int) -> bytes:
    data = pickle.encode_long(value)
    return b'\x8a' + bytes([len(data)]) + data


def laughs(depth: int) -> bytes:
    """Return opcodes of a dict whose two values are the same dict, and so on: short to write, long to walk."""
    levels = (b'}q%c(X\x01\0\0\0ah%cX\x01\0\0\0bh%cu' % (200 + i % 2, 201 - i % 2, 201 - i % 2) for i in range(depth))
    return b'}q\xc9' + b''.join(levels)


def copies(count: int) -> bytes:
    """Return opcodes that ask so many times for a copy of one long string."""
    one = b'c_codecs\nencode\nq\xca0' + _text('x' * 2**20) + b'q\xcb0]('
    return one + b'h\xcah\xcbX\x06\0\0\0latin1\x86R' * count + b'e'


def _op(rng: Random) -> bytes:
    """Return opcodes that a file might hold and should not."""
    return rng.choice((
        lambda: _global(rng) + rng.choice((_CALL, b')R', b')\x81', b'}b', b'(tR', _int(number(rng)) + b'\x85R', b'')),
        lambda: _int(number(rng)),
        lambda: _text(word(rng)),
        lambda: bytes([rng.randrange(256)]),
        lambda: b'(' * rng.choice((1, 1000, 100_000)),
        lambda: b']' * rng.choice((1, 1000)) + b'a' * rng.choice((1, 999)),
        lambda: b'(' + b']' * 2 + b'\x85' * rng.choice((1, 10_000, 500_000)),
        lambda: b'r' + struct.pack('<I', number(rng) % 2**32),
        lambda: b'j' + struct.pack('<I', number(rng) % 2**32),
        lambda: b'\x96' + struct.pack('<Q', number(rng) % 2**64),
        lambda: b'\x8d' + struct.pack('<Q', number(rng) % 2**64),
        lambda: b'\x8b' + struct.pack('<i', 2**31 - 1),
        lambda: b'I' + b'9' * rng.choice((10, 5000, 200_000)) + b'\n',
        lambda: rng.choice((
            b'Q', b'Pevil\n', b'\x82\x01', b'iposix\nsystem\n', b'o', b'\x92', b'2', b'0', b'.', b'\x97\x98')),
        lambda: laughs(rng.choice((3, 40, 60))) + b'0',
        lambda: laughs(40) + b's' * rng.randrange(2),
        lambda: copies(rng.choice((3, 4000))) + b'0',
    ))()


def mutate_pickle(rng: Random, data: bytes) -> bytes:
    """Drop, repeat, swap and insert opcodes of the first pickle in `data`, or change their arguments."""
    try:
        starts = [position for _, _, position in pickletools.genops(data)]
    except Exception:  # already damaged
        return mutate_bytes(rng, data, data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        # the last opcodes of the file's pickle build the state dict itself
        i = rng.randrange(len(starts)) if rng.random() < .7 else max(0, len(starts) - rng.randrange(1, 8))
        begin, end = starts[i], starts[i + 1] if i + 1 < len(starts) else len(data)
        op = data[begin:end]
        if op[:1] == b'c' and rng.random() < .5:
            op = _global(rng)
        elif op[:1] in b'KMJ\x8a' and rng.random() < .7:
            op = _int(number(rng))
        elif op[:1] == b'X' and rng.random() < .5:
            op = _text(word(rng))
        else:
            op = rng.choice((b'', 2 * op, _op(rng), op + _op(rng), _op(rng) + op))
        data = data[:begin] + op + data[end:]
        starts = starts[:i + 1]  # what comes after has moved
    return data


# ---------------------------------------------------------------- zips and safetensors

def mutate_zip(rng: Random, data: bytes, other: bytes) -> bytes:
    """Write a zip again with a member mutated, dropped, renamed, repeated or compressed."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = [(info.filename, old.read(info)) for info in old.infolist()]
    buffer, chosen = io.BytesIO(), rng.randrange(len(members))
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(buffer, 'w') as new:
        for i, (name, content) in enumerate(members):
            if name.endswith('data.pkl') and rng.random() < .7:
                content = mutate_pickle(rng, content)
            elif i == chosen:
                kind = rng.randrange(6)
                if kind == 0:
                    continue
                if kind == 1:
                    name = rng.choice((word(rng).encode('utf-8', 'replace').decode(), f'{name}x', f'../{name}')) or 'x'
                elif kind == 2:
                    content = mutate_bytes(rng, content, other)
                elif kind == 3:
                    content = content[:-4] or b'x'
                elif kind == 4:
                    name = rng.choice(members)[0]
            new.writestr(zipfile.ZipInfo(name), content, method)
    return buffer.getvalue()


def mutate_safetensors(rng: Random, data: bytes) -> bytes:
    """Write a safetensors file again with another header."""
    length, = struct.unpack('<Q', data[:8])
    header = json.loads(data[8:8 + length])
    for _ in range(rng.choice((1, 1, 3))):
        header = mutate_json(rng, header)
    new = json.dumps(header).encode()
    if rng.random() < .1:
        new = new[:-1] + b',"a":' + b'[' * 100_000
    if rng.random() < .1:
        new = new.replace(b'"F32"', rng.choice((b'"I64"', b'"BOOL"', b'"F8_E4M3"', b'"C64"', b'"F4"', b'"X"')))
    size = len(new) if rng.random() < .9 else number(rng) % 2**64
    return struct.pack('<Q', size) + new + data[8 + length:]


@lru_cache
def _legacy_pickles(fmt: str) -> list[int]:
    # magic number, protocol, sizes of integers, what was saved, the list of storages
    stream, starts = io.BytesIO(whole_file(fmt)), []
    for _ in range(5):
        starts.append(stream.tell())
        for _ in pickletools.genops(stream):
            pass
    return starts


def mutated_checkpoint(rng: Random) -> tuple[str, bytes]:
    """Return the format that a mutated file was of, and its bytes."""
    fmt = rng.choice(list(FORMATS))
    data, other = whole_file(fmt), whole_file(rng.choice(list(FORMATS)))
    kind = rng.randrange(10)
    if kind < 3:
        try:
            data = _resaved(rng, fmt)
            return fmt, data if len(data) < LARGEST else data[:LARGEST]
        except Exception:  # its own writer refuses such a thing
            kind = 9
    if kind < 7:
        if data.startswith(b'PK'):
            return fmt, mutate_zip(rng, data, other)
        if fmt == 'safetensors':
            return fmt, mutate_safetensors(rng, data)
        if 'legacy' in fmt:
            start = rng.choice(_legacy_pickles(fmt))
            return fmt, data[:start] + mutate_pickle(rng, data[start:])
        return fmt, mutate_pickle(rng, data)
    return fmt, mutate_bytes(rng, data, other)


def mutated_config(rng: Random, config: Path) -> bytes:
    """Return the bytes of a mutated config.json of a converted folder."""
    data = config.read_bytes()
    if rng.random() < .3:
        return mutate_bytes(rng, data, data)
    value = json.loads(data)
    if rng.random() < .3:
        argument = rng.choice(('depth', 'embed_dim', 'num_heads', 'img_size', 'in_chans', 'token_dim', 'num_classes'))
        value['model_args'] = {argument: rng.choice((number(rng), word(rng), [number(rng)] * 2))}
    for _ in range(rng.choice((1, 2, 4))):
        value = mutate_json(rng, value)
    return json.dumps(value).encode()
