"""verify: what it says of weights, good and bad, and of two."""
import published
import pytest
import torch

from t2t_timm.errors import UserError
from t2t_timm.hub.convert import convert
from t2t_timm.hub.verify import verify
from t2t_timm.weights.download import file_hash


def other_file(folder, state_dict):
    torch.save(state_dict, folder / 'other.pth')
    return str(folder / 'other.pth')


def test_verify(tmp_path, tiny_file):
    out = convert(tiny_file, 'test_t2t_vit', tmp_path / 'out')
    verdict = verify(str(tiny_file), str(out))
    text = '\n'.join(verdict.lines)
    assert verdict.good, text
    assert f'sha256: {file_hash(tiny_file)}' in text and f'sha256: {file_hash(out / "model.safetensors")}' in text
    assert text.count('architecture: test_t2t_vit; 10 classes, images of 3 x 56 x 56') == 2
    assert text.count('loads strictly: yes') == 2
    assert 'largest difference of the logits: 0 ' in text


def test_verify_finds_a_difference(tiny_file, tmp_path):
    state_dict = published.tiny()
    state_dict['head.bias'] = state_dict['head.bias'] + 2e-4
    verdict = verify(str(tiny_file), other_file(tmp_path, state_dict))
    assert not verdict.good
    assert 'largest difference of the logits: 0.0002 (more than 0.0001)' in verdict.lines[-1]


def test_verify_says_why_it_does_not_load(tiny_file, tmp_path):
    state_dict = published.tiny()
    del state_dict['norm.bias']
    file = other_file(tmp_path, state_dict)
    for second in (None, str(tiny_file)):
        verdict = verify(file, second, model='test_t2t_vit')
        assert not verdict.good
        assert any('loads strictly: no. ' in line and 'missing norm.bias' in line for line in verdict.lines)
    assert 'name the expected one with --model' in verify(file).lines[-1]


@pytest.mark.parametrize('config, words', [
    ('[]', 'no config.json from which timm can make a model'),
    ('{"architecture": "nope"}', "There is no architecture 'nope'"),
    ('{"architecture": "test_t2t_vit", "model_args": {"bad": 1}, "pretrained_cfg": {}}', "argument 'bad'"),
    ('{"architecture": "t2t_vit_7", "pretrained_cfg": {}}', 'looks like test_t2t_vit, not like t2t_vit_7'),
])
def test_verify_directory_with_a_bad_config(tmp_path, tiny_file, config, words):
    out = convert(tiny_file, 'test_t2t_vit', tmp_path / 'out')
    (out / 'config.json').write_text(config)
    verdict = verify(str(out))
    assert not verdict.good
    assert 'loads strictly: no. ' in verdict.lines[-1] and words in verdict.lines[-1]


def test_verify_refuses(tmp_path, tiny_file):
    with pytest.raises(UserError, match='cannot be compared'):
        verify(str(tiny_file), other_file(tmp_path, published.tiny(num_classes=3)))
    with pytest.raises(UserError, match='neither a folder, nor a file, nor a tag'):
        verify('nothing')
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='holds no model.safetensors'):
        verify(str(tmp_path / 'empty'))


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_values_that_are_not_finite(tmp_path, value):
    state_dict = published.tiny(num_classes=10)
    state_dict['head.bias'][3] = value
    words = 'other.pth is damaged: it has values that are not finite in float32, in head.bias.'
    assert words in verify(other_file(tmp_path, state_dict)).lines[-1]
