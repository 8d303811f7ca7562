"""Conversion: every published format to one directory, the same logits, and nothing left behind where it fails."""
import json
import logging
import os
import pickle
import re
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import published
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from t2t_timm.cli import main
from t2t_timm.commands.classify import classify
from t2t_timm.errors import UserError
from t2t_timm.hub.cards import tag_card
from t2t_timm.hub.convert import convert
from t2t_timm.weights.download import file_hash

pytestmark = pytest.mark.timm('1.0.31')  # convert says so

FILES = ['README.md', 'config.json', 'model.safetensors']


def model_logits(folder: Path, images: torch.Tensor) -> torch.Tensor:
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    with torch.inference_mode():
        return model(images)


@pytest.mark.parametrize('name', published.FORMATS)
def test_every_format(name, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write, file, architecture, words = published.FORMATS[name]
    write(tmp_path / file)
    out = convert(tmp_path / file, architecture, tmp_path / 'out')
    assert sorted(os.listdir(out)) == FILES
    assert words in caplog.text
    logits = model_logits(out, published.images()).double().numpy()
    np.testing.assert_allclose(logits, published.logits(architecture), rtol=0, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([file, 'out'])


def test_safetensors_whose_length_begins_as_a_pickle(tmp_path):
    state_dict = published.tiny()
    for padding in range(0, 300, 8):
        published.save_file(state_dict, tmp_path / 'a.safetensors', metadata={'x': 'x' * padding})
        if (tmp_path / 'a.safetensors').read_bytes()[0] == 0x80:
            break
    else:
        pytest.fail('no header of such a length')
    convert(tmp_path / 'a.safetensors', 'test_t2t_vit', tmp_path / 'out')


def test_tag(tmp_path):
    published.official_plain(tmp_path / 'a.pth')
    out = convert(tmp_path / 'a.pth', 't2t_vit_7.in1k', tmp_path / 'out')
    config = json.loads((out / 'config.json').read_text())
    assert config['architecture'] == 't2t_vit_7'
    assert config['pretrained_cfg']['tag'] == 'in1k'
    assert config['pretrained_cfg']['license'] == 'bsd-3-clause-clear'
    assert config['model_args'] == {}
    origin = (
        f'Converted from a file a.pth of {(tmp_path / "a.pth").stat().st_size} bytes, SHA-256 '
        f'{file_hash(tmp_path / "a.pth")}. No hash of the published file is known, so it could not be compared.')
    assert (out / 'README.md').read_text() == tag_card('t2t_vit_7.in1k', origin)


def test_no_tag_claims_nothing(tmp_path):
    published.official_plain(tmp_path / 'a.pth')
    out = convert(tmp_path / 'a.pth', 't2t_vit_7', tmp_path / 'out')
    cfg = json.loads((out / 'config.json').read_text())['pretrained_cfg']
    assert not {'tag', 'license', 'origin_url', 'label_names'} & set(cfg)
    card = (out / 'README.md').read_text()
    assert '71.' not in card and 'license:' not in card.split('---')[1]


@pytest.mark.parametrize('kwargs', [
    dict(num_classes=3),
    dict(num_classes=0),
    dict(num_classes=10, img_size=96),
    dict(num_classes=10, in_chans=1),
    dict(num_classes=2, img_size=40, in_chans=4),
], ids=str)
def test_weights_of_ones_own(tmp_path, kwargs, caplog):
    caplog.set_level(logging.INFO)
    state_dict = published.tiny(**kwargs)
    torch.save(state_dict, tmp_path / 'own.pth')
    out = convert(tmp_path / 'own.pth', 'test_t2t_vit', tmp_path / 'out')
    model = timm.create_model(f'local-dir:{out}', pretrained=True)
    assert (model.num_classes, model.in_chans) == (kwargs['num_classes'], kwargs.get('in_chans', 3))
    expected_size = 48 if kwargs.get('img_size') == 40 else kwargs.get('img_size', 56)  # the size that its grid says
    assert model.patch_embed.img_size == (expected_size, expected_size)
    taken = f'tokens taken for {expected_size} x {expected_size} pixels'
    assert (taken in caplog.text) == ('img_size' in kwargs)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state_dict[name]), name
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    if model.in_chans in (1, 3):
        pixels = transform(Image.new('L' if model.in_chans == 1 else 'RGB', (70, 90)))
        assert pixels.shape == (model.in_chans, *model.patch_embed.img_size)


@pytest.mark.parametrize('size, without', [
    ((56, 112), r'pos_embed \(1, 29, 64\) instead of \(1, 17, 64\), for images of 56 x 56 .* as --img-size H W'),
    ((64, 144), 'nothing says the image size, 36 tokens taken for 96 x 96 pixels: give --img-size H W'),
], ids=str)
def test_a_size_that_nothing_says_is_given(tmp_path, capsys, size, without):
    torch.manual_seed(0)
    own = timm.create_model('test_t2t_vit', img_size=size, num_classes=10, pos_embed='learn').eval()
    torch.save(own.state_dict(), tmp_path / 'own.pth')
    file, out, other = (str(tmp_path / name) for name in ('own.pth', 'out', 'other'))
    status = main(['convert', file, '--model', 'test_t2t_vit', '--out', other])
    assert re.search(without, capsys.readouterr().err) and status == (size == (56, 112))
    given = ['--img-size', *map(str, size)]
    assert main(['convert', file, '--model', 'test_t2t_vit', '--out', out, *given]) == 0
    assert main(['verify', file, out, *given]) == 0
    told = capsys.readouterr()
    assert 'nothing says the image size' not in told.out + told.err
    images = torch.randn(2, 3, *size)
    with torch.inference_mode():
        torch.testing.assert_close(model_logits(Path(out), images), own(images), rtol=0, atol=1e-6)
    assert main(['verify', file]) == status and re.search(without, capsys.readouterr().out)
    assert main(['verify', out, *given]) == 1
    assert '--img-size and --key are for checkpoint files' in capsys.readouterr().err


@pytest.mark.parametrize('args, words', [
    (['--model', 'test_t2t_vit', '--img-size', '64', '96'], '(1, 25, 64), for images of 64 x 96 pixels: give the size'),
    (['--model', 'test_t2t_vit.mnist', '--img-size', '56'], 'for weights of your own, which have no tag: use'),
    (['--model', 'test_t2t_vit', '--key', 'teacher'], "holds no T2T-ViT under 'teacher', but under no key."),
])
def test_a_size_or_key_that_does_not_fit(tiny_file, capsys, args, words):
    assert main(['convert', str(tiny_file), '--out', str(tiny_file.parent / 'out'), *args]) == 1
    assert words in capsys.readouterr().err
    assert main(['verify', str(tiny_file), *args]) == 1
    assert words in capsys.readouterr().out
    assert [path.name for path in tiny_file.parent.iterdir()] == ['tiny.pth']


@pytest.fixture
def animals(photos):
    """A folder of class folders, 2 before 10 as timm sorts them, and one without images."""
    folder = photos('10 cats', '2 dogs', 'a/birds')
    (folder / 'empty').mkdir()
    return folder


def test_label_names(tmp_path, animals):
    torch.save(published.tiny(num_classes=3), tmp_path / 'own.pth')
    names = ['2 dogs', '10 cats', 'birds']
    (tmp_path / 'names.txt').write_text('\n'.join(names) + '\n')
    for labels in (animals, tmp_path / 'names.txt'):
        out = convert(tmp_path / 'own.pth', 'test_t2t_vit', tmp_path / f'out-{labels.name}', labels)
        assert timm.create_model(f'local-dir:{out}', pretrained=True).pretrained_cfg['label_names'] == names
        assert 'Classes: 2 dogs, 10 cats, birds.' in (out / 'README.md').read_text()
    results = list(classify([str(animals / '2 dogs')], f'local-dir:{out}'))
    assert sorted(c['label'] for c in results[0]['classes']) == sorted(names)


@pytest.mark.parametrize('labels, words', [
    ('photos', 'photos should name the 4 classes of .*, but it names 3'),
    ('photos/2 dogs', 'should hold a folder of images for each class'),
    ('photos/empty', 'should hold a folder of images for each class'),
    ('nowhere', 'No such file or directory.*nowhere'),
    (b'a\n\nb', 'one class name per line, each once'),
    (b'a\nb\na', 'one class name per line, each once'),
    (b'', 'should name the 4 classes of .*, but it names 0'),
    ('a\nb\nc\nd'.encode('utf-16'), 'is not a text file in UTF-8'),
    (b'a\nb\nc\n\x1b[31md', 'in printable characters'),
])
def test_label_names_that_do_not_fit(tmp_path, animals, labels, words):
    torch.save(published.tiny(num_classes=4), tmp_path / 'own.pth')
    path = tmp_path / (labels if isinstance(labels, str) else 'names.txt')
    if isinstance(labels, bytes):
        path.write_bytes(labels)
    with pytest.raises((UserError, OSError), match=words):
        convert(tmp_path / 'own.pth', 'test_t2t_vit', tmp_path / 'out', path)
    assert not (tmp_path / 'out').exists()


def test_a_tag_has_its_label_names(tiny_file, animals):
    with pytest.raises(UserError, match='which have no tag: use --model test_t2t_vit'):
        convert(tiny_file, 'test_t2t_vit.mnist', tiny_file.parent / 'out', animals)


@pytest.mark.parametrize('name', ['pos_embed', 'head.weight', 'head.bias', 'patch_embed.attention1.kqv.weight'])
@pytest.mark.parametrize('shape', [(), (1,), (1, 1), (1, 0, 64), (4, 50)], ids=str)
def test_tensor_of_senseless_shape(tiny_file, name, shape):
    torch.save(dict(published.tiny(), **{name: torch.zeros(shape)}), tiny_file)
    fails(tiny_file, 'test_t2t_vit', 'does not fit test_t2t_vit: ')


def test_half_precision_becomes_float32(tmp_path):
    torch.save({k: v.half() for k, v in published.tiny().items()}, tmp_path / 'half.pth')
    out = convert(tmp_path / 'half.pth', 'test_t2t_vit', tmp_path / 'out')
    assert {v.dtype for v in load_file(out / 'model.safetensors').values()} == {torch.float32}


def fails(file: Path, model: str, words: str | None, error: type = UserError) -> None:
    with pytest.raises(error, match=words):
        convert(file, model, file.parent / 'out')
    assert sorted(file.parent.iterdir()) == ([file] if file.exists() else [])


def test_missing_and_unexpected_names(tiny_file):
    state_dict = published.tiny()
    del state_dict['patch_embed.attention1.w']
    state_dict['extra'] = torch.zeros(1)
    torch.save(state_dict, tiny_file)
    fails(tiny_file, 'test_t2t_vit', r'missing patch_embed.attention1.w; unexpected extra')


@pytest.mark.parametrize('classes, model, words', [
    (10, 't2t_vit_10', 'looks like test_t2t_vit, not like t2t_vit_10: use --model test_t2t_vit'),
    (7, 'test_t2t_vit.mnist', r'head.bias \(7,\) instead of \(10,\): if it is not that tag, use --model test_t2t_vit'),
    (10, 'test_t2t_vit.mnist', 'size of tiny.pth should be 1374720 .* use --model test_t2t_vit'),
    (10, 't2t_vit_8', "no architecture 't2t_vit_8'; there are"),
    (10, 'test_t2t_vit.cifar', "no tag 'cifar'; its tags are test_t2t_vit.mnist"),
    (10, 't2t_vit_c_14.in1k', 'it has no tags'),
])
def test_a_name_that_is_not_that_of_the_weights(tiny_file, classes, model, words):
    torch.save(published.tiny(num_classes=classes), tiny_file)
    fails(tiny_file, model, words)


def test_an_older_timm_is_told_before_a_class_map_is_read(tiny_file, animals, monkeypatch):
    """Releases before 1.0.31 run what a class map in a pickle asks for."""
    monkeypatch.setattr(timm, '__version__', '1.0.30')
    evil = tiny_file.parent / 'map.pkl'
    evil.write_bytes(pickle.dumps(published.Evil(f'touch {tiny_file.parent / "trace"}')))
    torch.save(dict(state_dict=published.tiny(num_classes=3), args=Namespace(class_map=str(evil))), tiny_file)
    with pytest.raises(UserError, match=r'needs timm 1\.0\.31'):
        convert(tiny_file, 'test_t2t_vit', tiny_file.parent / 'out', animals)
    assert not (tiny_file.parent / 'trace').exists()


def test_no_file(tmp_path):
    fails(tmp_path / 'none.pth', 'test_t2t_vit', 'No such file or directory.*none.pth', OSError)
    (tmp_path / 'folder').mkdir()
    fails(tmp_path / 'folder', 'test_t2t_vit', 'folder', OSError)


@pytest.mark.parametrize('content, words', [
    (b'', 'is empty'),
    (b'<html>not found</html>', 'not a checkpoint of a known format'),
    (b'PK\x03\x04 and no zip', 'not a readable PyTorch checkpoint'),
    (pickle.dumps([1, 2]), 'holds a list, not a state dict'),
    (pickle.dumps({'a': 1}), 'holds no T2T-ViT'),
])
def test_no_checkpoint(tmp_path, content, words):
    (tmp_path / 'a.pth').write_bytes(content)
    fails(tmp_path / 'a.pth', 'test_t2t_vit', words)


def write_paddle(state_dict, path):
    path.write_bytes(pickle.dumps({k: v.numpy() for k, v in state_dict.items()}, protocol=4))


write_legacy = partial(torch.save, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize('part', [0.999, 0.5, 0.01])
@pytest.mark.parametrize('write', [torch.save, write_legacy, write_paddle, published.save_file])
def test_cut_short(tmp_path, write, part):
    file = tmp_path / 'a.pth'
    write(published.tiny(), file)
    whole = file.read_bytes()
    file.write_bytes(whole[:int(len(whole) * part)])
    fails(file, 'test_t2t_vit', 'cut short|damaged|not a Paddle parameter file')


@pytest.mark.parametrize('write', [torch.save, write_legacy, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_malicious_pickle_is_refused(tmp_path, write):
    trace = tmp_path / 'trace'
    file = tmp_path / 'a.pth'
    write({'state_dict': {}, 'epoch': published.Evil(f'touch {trace}')}, file)
    fails(file, 'test_t2t_vit', 'system')
    assert not trace.exists()


def test_pickled_objects_are_refused(tmp_path):
    torch.save({'state_dict': published.tiny(), 'path': Path('x')}, tmp_path / 'a.pth')
    fails(tmp_path / 'a.pth', 'test_t2t_vit', 'asks for pathlib.*nothing was loaded')


def test_an_empty_directory_is_taken_and_a_file_is_not(tiny_file):
    out = tiny_file.parent / 'out'
    out.mkdir()
    convert(tiny_file, 'test_t2t_vit', out)
    assert sorted(os.listdir(out)) == FILES
    with pytest.raises(UserError, match='is not a folder'):
        convert(tiny_file, 'test_t2t_vit', tiny_file)
