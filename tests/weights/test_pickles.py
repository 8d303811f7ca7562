"""Pickles that would hang or fill the memory of who reads them: refused in time. Found by fuzzing."""
import io
import pickle
import zipfile

import published
import pytest
import torch
from fuzz.checkpoints import copies, laughs

from t2t_timm.errors import UserError
from t2t_timm.weights.checkpoint import read_checkpoint

pytestmark = pytest.mark.timeout(20)


def test_a_dict_of_the_same_dict_twice_in_a_paddle_file(tmp_path):
    (tmp_path / 'a').write_bytes(b'\x80\x02' + laughs(60) + b'.')
    with pytest.raises(UserError, match='holds no T2T-ViT'):
        read_checkpoint(tmp_path / 'a')


@pytest.mark.parametrize('zipped', [True, False])
def test_a_call_of_a_dict_of_the_same_dict_twice_in_a_torch_file(tmp_path, zipped):
    buffer = io.BytesIO()
    torch.save({'a': torch.ones(1)}, buffer, _use_new_zipfile_serialization=zipped)
    evil = b'\x80\x02' + laughs(60) + b')R.'
    if zipped:
        with zipfile.ZipFile(tmp_path / 'a', 'w') as new, zipfile.ZipFile(buffer) as old:
            for info in old.infolist():
                new.writestr(info, evil if info.filename.endswith('data.pkl') else old.read(info))
    else:
        data = io.BytesIO(buffer.getvalue())
        for _ in range(3):
            pickle.load(data)  # the numbers before what was saved
        (tmp_path / 'a').write_bytes(buffer.getvalue()[:data.tell()] + evil)
    with pytest.raises(UserError, match='not a readable PyTorch checkpoint'):
        read_checkpoint(tmp_path / 'a')


def test_many_copies_of_a_long_text(tmp_path):
    (tmp_path / 'a').write_bytes(b'\x80\x02' + copies(100_000) + b'.')
    with pytest.raises(UserError, match='more than its size explains'):
        read_checkpoint(tmp_path / 'a')


def test_a_compressed_part(tmp_path):
    torch.save(published.tiny(), tmp_path / 'whole')
    with zipfile.ZipFile(tmp_path / 'a', 'w', zipfile.ZIP_DEFLATED) as new, zipfile.ZipFile(tmp_path / 'whole') as old:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(UserError, match='compressed, which torch.save does not do'):
        read_checkpoint(tmp_path / 'a')


@pytest.mark.parametrize('make, words', [
    (lambda value: value.to_sparse(), 'not a plain tensor'),
    (lambda value: torch.quantize_per_tensor(value, .1, 0, torch.qint8), 'not a plain tensor'),
    (lambda value: value.to('meta'), 'not a plain tensor'),
    (lambda value: value.to(torch.complex64), 'not a plain tensor'),
    (lambda value: value.to(torch.int16), 'not a plain tensor'),
    (lambda value: torch.nested.nested_tensor([value]), 'not a plain tensor'),
    (lambda value: torch.zeros(1).expand(2**30, 64), 'is damaged: its tensors should have'),
])
def test_tensors_that_are_no_weights(tmp_path, make, words):
    state_dict = published.tiny()
    state_dict['head.weight'] = make(state_dict['head.weight'])
    torch.save(state_dict, tmp_path / 'a')
    with pytest.raises(UserError, match=words):
        read_checkpoint(tmp_path / 'a')


def test_a_repeated_number_in_a_file_of_paddles_layout(tmp_path):
    value = torch.zeros(1).expand(2**18, 2**18)
    torch.save(dict(published.paddle(published.tiny()), **{'blocks.0.attn.proj.weight': value}), tmp_path / 'a')
    with pytest.raises(UserError, match='is damaged: its tensors should have'):
        read_checkpoint(tmp_path / 'a')


def test_an_array_under_many_names(tmp_path):
    array = published.tiny()['head.weight'].numpy().repeat(1000, 0)
    weights = {k: v.numpy() for k, v in published.paddle(published.tiny()).items()}
    weights.update({f'blocks.0.mlp.{i}.weight': array for i in range(100_000)})
    (tmp_path / 'a').write_bytes(pickle.dumps(weights, protocol=4))
    with pytest.raises(UserError, match='is damaged: its tensors should have'):
        read_checkpoint(tmp_path / 'a')


def test_messages_are_one_printable_line():
    assert str(UserError('a\nb\x1b[31mc é 漢')) == r'a\nb\x1b[31mc é 漢'
    assert len(str(UserError('x' * 10**6))) < 2000
