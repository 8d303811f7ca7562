"""Classification: the results do not depend on how they are asked for, and can be read whatever files are called."""
import csv
import io
import json
import os
import sys

import pytest
import timm
import torch
from PIL import Image

from t2t_timm.cli import main
from t2t_timm.commands.classify import classify, write_results
from t2t_timm.commands.images import image_reader
from t2t_timm.digits import extract_heldout

ODD = ['a\nb.png', '\x1b[31mred.png', 'ü"\'.png', 'a,b.png']


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """Folder of five digits."""
    folder, every = tmp_path_factory.mktemp('digits'), extract_heldout(tmp_path_factory.mktemp('all') / 'digits')
    for i, file in enumerate(sorted(every.rglob('*.png'))[::200]):
        file.rename(folder / f'{i}.png')
    return folder


@pytest.fixture(scope='module')
def odd(digits, tmp_path_factory):
    """Folder of files with odd names, one of them not in UTF-8 where the system has such names."""
    folder, data = tmp_path_factory.mktemp('odd'), (digits / '0.png').read_bytes()
    try:
        for name in [*ODD, os.fsdecode(b'caf\xe9.png')]:
            (folder / name).write_bytes(data)
    except OSError as e:
        pytest.skip(f'this system has no names that are not UTF-8; run it on Linux: {e}')
    return folder


def run(capsys, *argv):
    assert main(['classify', *map(str, argv), '--model', 'test_t2t_vit']) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize('batch_size', [1, 2, 5, 99])
def test_batches(digits, batch_size):
    model = timm.create_model('test_t2t_vit', pretrained=True).eval()
    read = image_reader(model)
    results = list(classify([str(digits / f'{i}.png') for i in range(5)], 'test_t2t_vit', 10, batch_size))
    for i, result in enumerate(results):
        with torch.inference_mode():
            expected = model(read(str(digits / f'{i}.png'))).softmax(dim=1)[0].tolist()
        assert result['image'] == str(digits / f'{i}.png')
        for c in result['classes']:
            assert c['probability'] == pytest.approx(expected[c['index']], abs=1e-5)
    assert len(results) == 5


def test_image_size(digits):
    model = timm.create_model('test_t2t_vit', pretrained=True, img_size=(40, 72)).eval()
    result, = classify([str(digits / '0.png')], 'test_t2t_vit', 1, img_size=(40, 72))
    with torch.inference_mode():
        expected = model(image_reader(model)(str(digits / '0.png'))).softmax(dim=1).max().item()
    assert result['classes'][0]['probability'] == pytest.approx(expected, abs=1e-5)


def test_an_image_that_was_turned_is_classified_as_it_is_seen(digits, tmp_path, capsys):
    with Image.open(digits / '1.png') as image:
        exif = Image.Exif()
        exif[0x0112] = 3
        image.rotate(180).save(tmp_path / 'turned.png', exif=exif)
    upright, turned = (
        json.loads(run(capsys, file, '--json'))[0]['classes'] for file in (digits / '1.png', tmp_path / 'turned.png'))
    assert turned == upright


def test_results_come_as_they_come(digits):
    seen = []

    class File(io.StringIO):
        def flush(self):
            seen.append(self.getvalue().count('.png'))

    def results():
        for i, result in enumerate(classify([str(digits)], 'test_t2t_vit', batch_size=2)):
            assert len(seen) == i  # what was given before has been written
            yield result

    assert write_results(results(), 'text', File()) == 0
    assert seen == [1, 2, 3, 4, 5]


def test_json_and_csv_say_the_same(digits, tmp_path, capsys):
    expected = json.loads(run(capsys, digits, '--json', '--topk', '3'))
    rows = list(csv.DictReader(io.StringIO(run(capsys, digits, '--csv', '--topk', '3'))))
    assert rows == [
        dict(image=r['image'], rank=str(rank), index=str(c['index']), label=c['label'],
             probability=f'{c["probability"]:.6f}')
        for r in expected for rank, c in enumerate(r['classes'], 1)]
    assert len(rows) == 15
    out = tmp_path / 'results.json'
    assert run(capsys, digits, '--json', '--topk', '3', '--out', out) == f'{out}\n'
    assert json.loads(out.read_text()) == expected
    assert [p.name for p in tmp_path.iterdir()] == ['results.json']


def test_json_of_odd_names(odd, capsys):
    out = run(capsys, odd, '--json', '--topk', '1')
    assert out.isascii()
    names = {os.fsencode(r['image']) for r in json.loads(out)}
    assert names == {os.fsencode(p) for p in odd.iterdir()} and len(names) == 5


@pytest.mark.parametrize('form', [[], ['--csv']])
def test_odd_names_do_not_reach_the_terminal_raw(odd, capsys, form):
    out = run(capsys, odd, '--topk', '1', *form)
    assert all(c.isprintable() or c == '\n' for c in out)
    for name in (r'a\nb.png', r'\x1b[31mred.png', 'ü', r'caf\udce9.png'):
        assert name in out
    assert len(out.splitlines()) == (6 if form else 10)


def test_what_cannot_be_read_is_named_in_print(tmp_path, capsys):
    (tmp_path / '\x1b[31m.png').write_bytes(b'text')
    assert main(['classify', str(tmp_path), '--model', 'test_t2t_vit', '--json']) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == []
    line = err.splitlines()[-1]
    assert line.startswith(f'{tmp_path}/\\x1b[31m.png: cannot be read: cannot identify image file') or os.sep != '/'
    assert '\x1b' not in err


def test_weights_that_are_damaged(digits, monkeypatch, capsys):
    model = timm.create_model('test_t2t_vit', pretrained=True).eval()
    torch.nn.init.constant_(model.head.bias, float('nan'))
    monkeypatch.setattr('t2t_timm.commands.classify.load_t2t_vit', lambda name: model)
    assert main(['classify', str(digits), '--json']) == 1
    out, err = capsys.readouterr()
    assert 'NaN' not in out and 'The probabilities are not finite numbers: the weights are damaged.' in err


def test_progress_leaves_results_alone(digits, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr('t2t_timm.commands.classify.tqdm', lambda **kwargs: shown.append(kwargs) or Bar())
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, 'isatty', lambda terminal=terminal: terminal)
        run(capsys, digits)
    assert [s['disable'] for s in shown] == [None, True]  # None: if stderr is a terminal


class Bar:
    def update(self):
        pass

    close = update
