"""Paddle files: numbers are read, nothing else is."""
import io
import pickle
import random
import types

import numpy as np
import published
import pytest
import torch
import warm

from t2t_timm.errors import UserError
from t2t_timm.weights.checkpoint import read_checkpoint
from t2t_timm.weights.names import find_weights
from t2t_timm.weights.paddle import load_paddle


def test_square_weights_are_transposed(tmp_path):
    published.paddle_article(tmp_path / 'a.pdparams')
    state_dict = read_checkpoint(tmp_path / 'a.pdparams').state_dict
    for name, expected in find_weights(published.tensors('t2t_vit_7'))[0].items():
        assert torch.equal(state_dict[name], expected), name
    assert expected.shape and state_dict['blocks.0.attn.proj.weight'].shape == (256, 256)


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


@pytest.mark.parametrize('protocol', range(6))
def test_paddle_arrays(tmp_path, protocol):
    arrays = {
        'f4': np.random.RandomState(0).standard_normal((3, 4)).astype('f4'),
        'fortran': np.asfortranarray(np.arange(6., dtype='f8').reshape(2, 3)),
        'big': np.arange(6, dtype='>i4').reshape(3, 2),
        'half': np.ones(2, 'f2'),
        'scalar': np.float32(2.5),
        'empty': np.zeros((0, 3), 'f4'),
    }
    (tmp_path / 'a').write_bytes(pickle.dumps({**arrays, 'epoch': 3}, protocol=protocol))
    with open(tmp_path / 'a', 'rb') as f:
        loaded = load_paddle(f)
    assert loaded.pop('epoch') == 3
    assert list(loaded) == list(arrays)
    for name, value in arrays.items():
        np.testing.assert_array_equal(loaded[name], value)
        assert loaded[name].dtype == value.dtype


@pytest.mark.parametrize('protocol', [2, 3, 4])
def test_paddle_itself(tmp_path, protocol):
    paddle = pytest.importorskip('paddle', reason='pip install paddlepaddle')
    state = published.foreign('paddle_article', 't2t_vit_7', True)
    paddle.save({k: paddle.to_tensor(v) for k, v in state.items()}, str(tmp_path / 'a.pdparams'), protocol=protocol)
    with open(tmp_path / 'a.pdparams', 'rb') as f:
        loaded = load_paddle(f)
    assert list(loaded) == list(state)
    for name, value in state.items():
        np.testing.assert_array_equal(loaded[name], value)


def test_damaged_in_any_place(tmp_path):
    """A byte changed anywhere is a clear error or still a dict of numbers, and never anything else."""
    arrays = {'a': np.arange(4, dtype='f4').reshape(2, 2), 'b': np.float64(1.)}
    rng = random.Random(0)
    outcomes = set()
    for protocol in (2, 4, 5):
        whole = pickle.dumps(arrays, protocol=protocol)
        for _ in range(500):
            damaged = bytearray(whole)
            for _ in range(rng.choice((1, 1, 2, 5))):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            try:
                loaded = load_paddle(io.BytesIO(bytes(damaged)))
            except UserError:
                outcomes.add('refused')
            else:
                assert all(not isinstance(v, np.ndarray) or v.dtype.kind in 'biuf' for v in loaded.values())
                outcomes.add('read')
    assert outcomes == {'refused', 'read'}


@pytest.mark.slow
@pytest.mark.parametrize('claim', [
    b'\x96' + (6 << 30).to_bytes(8, 'little') + b'abc',  # bytearray of 6 GB
    b'\x8e' + (6 << 30).to_bytes(8, 'little') + b'abc',  # bytes
    b'\x95' + (6 << 30).to_bytes(8, 'little') + b'abc',  # frame
    b'Nr' + (1 << 31).to_bytes(4, 'little') + b'.',  # entry of the memo
], ids=['bytearray', 'bytes', 'frame', 'memo'])
def test_claims_of_size_take_no_memory(claim):
    code = (
        'import io, resource, sys\n'
        'from t2t_timm.weights.paddle import load_paddle\n'
        'before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n'
        'try: load_paddle(io.BytesIO(bytes.fromhex(sys.argv[1])))\n'
        'except RuntimeError: pass\n'
        'sys.exit(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 100 << 10)\n'
    )
    assert warm.run(code, (b'\x80\x05' + claim).hex()).returncode == 0


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
        with pytest.raises(UserError, match='not a Paddle parameter file'):
            load_paddle(io.BytesIO(b'\x80\x02' + attack))
