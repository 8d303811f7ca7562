"""Paddle files: numbers are read, nothing else is."""
import pickle
import types

import numpy as np
import published
import pytest
import torch
import warm

from t2t_timm.errors import UserError
from t2t_timm.weights.checkpoint import read_checkpoint
from t2t_timm.weights.paddle import as_tensor, load_paddle


@pytest.mark.parametrize('value', [
    np.array([published.Evil('true'), 1], dtype=object),
    np.array(['text']),
    np.zeros(2, dtype=[('a', 'f4'), ('b', 'i4')]),
    types.SimpleNamespace(a=1),
    print,
], ids=['objects', 'text', 'records', 'namespace', 'function'])
@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_paddle_admits_numbers_only(tmp_path, value, protocol):
    (tmp_path / 'a.pdparams').write_bytes(pickle.dumps({'a': value}, protocol=protocol))
    with pytest.raises(UserError, match=r'^\S+/a.pdparams is not a Paddle parameter file: .*Only numpy arrays are'):
        read_checkpoint(tmp_path / 'a.pdparams')


def assert_read(file, arrays):
    """That a file holds these arrays and nothing else."""
    with open(file, 'rb') as f:
        loaded = load_paddle(f)
    assert list(loaded) == list(arrays)
    for name, value in arrays.items():
        assert torch.equal(as_tensor(loaded[name]), torch.tensor(value.astype(value.dtype.newbyteorder('='))))


@pytest.mark.parametrize('protocol', range(6))
def test_paddle_arrays(tmp_path, protocol):
    arrays = {
        'f4': np.random.RandomState(0).standard_normal((3, 4)).astype('f4'),
        'fortran': np.asfortranarray(np.arange(6., dtype='f8').reshape(2, 3)),
        'big': np.arange(6, dtype='>i4').reshape(3, 2),
        'half': np.ones(2, 'f2'),
        'empty': np.zeros((0, 3), 'f4'),
    }
    (tmp_path / 'a').write_bytes(pickle.dumps(arrays, protocol=protocol))
    assert_read(tmp_path / 'a', arrays)


class Tensor:
    """What paddle.save makes of a tensor inside another dict."""

    def __reduce__(self):
        return tuple, (('linear_0.w_0', np.ones(2, 'f4')),)


@pytest.mark.parametrize('protocol', [2, 3, 4])
def test_a_dict_inside_another(tmp_path, protocol):
    saved = {'epoch': 3, 'loss': np.float32(2.5), 'model': {'a': Tensor()}, 'betas': (.9, .99)}
    (tmp_path / 'a').write_bytes(pickle.dumps(saved, protocol=protocol))
    with open(tmp_path / 'a', 'rb') as f:
        loaded = load_paddle(f)
    assert torch.equal(as_tensor(loaded.pop('model')['a']), torch.ones(2))
    assert loaded == {'epoch': 3, 'loss': 2.5, 'betas': (.9, .99)}


@pytest.mark.parametrize('protocol', [2, 3, 4])
def test_paddle_itself(tmp_path, protocol):
    paddle = pytest.importorskip('paddle', reason='pip install paddlepaddle')
    state = published.foreign('paddle_article', 't2t_vit_7', True)
    paddle.save({k: paddle.to_tensor(v) for k, v in state.items()}, str(tmp_path / 'a.pdparams'), protocol=protocol)
    assert_read(tmp_path / 'a.pdparams', state)


@pytest.mark.slow
def test_claims_of_size_take_no_memory(tmp_path):
    huge = (6 << 30).to_bytes(8, 'little') + b'abc'
    memo = b'Nr' + (1 << 31).to_bytes(4, 'little')
    claims = dict(bytearray=b'\x96' + huge, bytes=b'\x8e' + huge, frame=b'\x95' + huge, memo=memo)
    for name, claim in claims.items():
        (tmp_path / name).write_bytes(b'\x80\x05' + claim + b'.')
    code = (
        'import resource, sys\n'
        'from t2t_timm.errors import UserError\n'
        'from t2t_timm.weights.checkpoint import read_checkpoint\n'
        'before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
        'for file in sys.argv[1:]:\n'
        '    try: read_checkpoint(file)\n'
        '    except UserError: pass\n'
        '    else: sys.exit(2)\n'
        'sys.exit(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 100 << 10)\n'
    )
    assert warm.run(code, *(str(tmp_path / name) for name in claims)).returncode == 0


def test_what_is_built_by_hand(tmp_path):
    """Pickles that put a state on what they were given, as an attack would."""
    attacks = [
        b'cnumpy\ndtype\n(S\'O\'tR.',  # a type of objects
        b'cnumpy\ndtype\n(S\'f4\'tR(I3\nS\'<\'NNNI-1\nI-1\nI63\ntb.',  # flags, which numpy would take
        b'cnumpy\nndarray\n(I1\ntR.',
        b'cnumpy.core.multiarray\n_reconstruct\n(}S\'x\'I1\nsb.',  # attributes of the function itself
        b'cbuiltins\neval\n(S\'1\'tR.',
        b'c_codecs\nencode\n(I1\nS\'latin1\'tR.',
        b'cnumpy\ndtype.__class__\n.',
    ]
    for attack in attacks:
        (tmp_path / 'a').write_bytes(b'\x80\x02' + attack)
        with pytest.raises(UserError, match='not a Paddle parameter file|not a state dict'):
            read_checkpoint(tmp_path / 'a')
