"""Classification: the results do not depend on how they are asked for, and can be read whatever files are called."""
import csv
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
from PIL import Image

from t2t_timm.cli import main
from t2t_timm.commands.classify import classify
from t2t_timm.commands.images import ImageReader
from t2t_timm.commands.results import write_results
from t2t_timm.digits import extract_heldout
from t2t_timm.files import sole_writer

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
    read = ImageReader(model)
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
        expected = model(ImageReader(model)(str(digits / '0.png'))).softmax(dim=1).max().item()
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

    write_results(results(), 'text', File())
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


def test_the_same_file_twice(digits):
    for batch_size in (1, 2):
        file = str(digits / '0.png')
        assert [r['image'] for r in classify([file, file], 'test_t2t_vit', batch_size=batch_size)] == [file, file]


def test_workers_give_the_same(digits, tmp_path):
    (tmp_path / 'text.png').write_text('text')
    Image.new('L', (1, 60000)).save(tmp_path / 'thin.png')
    names = [str(digits), str(tmp_path)]
    here, there = (list(classify(names, 'test_t2t_vit', 3, 2, workers=workers)) for workers in (0, 2))
    assert here == there and [r['image'] for r in here if 'error' in r] == [
        str(tmp_path / 'text.png'), str(tmp_path / 'thin.png')]


@pytest.mark.parametrize('workers', [0, 1])
def test_whatever_an_image_does_the_others_are_answered(digits, monkeypatch, workers):
    opened = Image.open

    def fail(file, *args):
        if str(file).endswith('2.png'):
            raise MemoryError
        if str(file).endswith('3.png'):
            raise KeyError('strange')
        return opened(file, *args)
    monkeypatch.setattr('PIL.Image.open', fail)
    if workers and torch.multiprocessing.get_start_method() != 'fork':
        pytest.skip('workers see the patch only if they are forked: run it on Linux with Python 3.13 or older')
    results = list(classify([str(digits)], 'test_t2t_vit', 1, workers=workers))
    assert {os.path.basename(r['image']): r.get('error') for r in results} == {
        '0.png': None, '1.png': None, '2.png': 'there is not enough memory for it', '3.png': "'strange'", '4.png': None}


def test_a_worker_that_is_killed_is_one_sentence(digits, monkeypatch, capsys):
    if torch.multiprocessing.get_start_method() != 'fork':
        pytest.skip('workers see the patch only if they are forked: run it on Linux with Python 3.13 or older')
    monkeypatch.setattr(ImageReader, 'pixels', lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    assert main(['classify', str(digits), '--model', 'test_t2t_vit', '--workers', '1']) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert 'A process that reads images has ended (' in err and err.endswith('or a smaller --batch-size.')


def test_embeddings_are_those_of_timm(digits):
    results = list(classify([str(digits)], 'test_t2t_vit', 1, embeddings=True))
    model = timm.create_model('test_t2t_vit', pretrained=True, num_classes=0).eval()
    read = ImageReader(model)
    for result in results:
        with torch.inference_mode():
            expected = model(read(result['image']))[0]
        torch.testing.assert_close(torch.tensor(result['embedding']), expected, rtol=1e-4, atol=1e-5)
    bare, = classify([str(digits / '0.png')], 'test_t2t_vit', embeddings=True, num_classes=0)
    assert bare['classes'] == [] and bare['embedding'] == pytest.approx(results[0]['embedding'], abs=1e-5)


def test_autocast(digits):
    exact, rounded = (
        [c['probability'] for r in classify([str(digits)], 'test_t2t_vit', 10, amp=amp)
         for c in sorted(r['classes'], key=lambda c: c['index'])] for amp in (None, torch.bfloat16))
    assert rounded == pytest.approx(exact, abs=0.05) and rounded != exact


def test_parquet_says_the_same_as_json(digits, odd, tmp_path, capsys):
    parquet = pytest.importorskip('pyarrow.parquet', reason='pip install pyarrow')
    images = (digits, odd)
    expected = json.loads(run(capsys, *images, '--json', '--topk', '3', '--embeddings'))
    run(capsys, *images, '--parquet', '--topk', '3', '--embeddings', '--out', tmp_path / 'a.parquet')
    rows = parquet.read_table(tmp_path / 'a.parquet').to_pylist()
    assert [row.pop('image') for row in rows] == [
        r['image'].encode('utf-8', 'backslashreplace').decode() for r in expected]
    for row, r in zip(rows, expected, strict=True):
        assert row.pop('embedding') == pytest.approx(r['embedding'], rel=1e-7)
        assert row == {key: [c[key] for c in r['classes']] for key in ('index', 'label', 'probability')}
    assert [p.name for p in tmp_path.iterdir()] == ['a.parquet']


def test_parquet_needs_pyarrow(digits, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    assert main(['classify', str(digits), '--parquet', '--out', 'a.parquet']) == 1
    assert capsys.readouterr().err == 't2t-timm classify: Parquet needs pyarrow: pip install pyarrow\n'


@pytest.fixture
def resumed(tmp_path, capsys):
    """A function that classifies three copies of a digit to out.csv, and gives the exit code and what was said."""
    def resumed(*options):
        code = main([
            'classify', *(str(tmp_path / f'{i}.png') for i in range(3)), '--model', 'test_t2t_vit', '--topk', '1',
            '--csv', '--out', str(tmp_path / 'out.csv'), *options])
        return code, capsys.readouterr().err.splitlines()[-1:]
    return resumed


def test_what_a_cut_run_leaves(digits, tmp_path, monkeypatch, resumed):
    for i in range(3):
        (tmp_path / f'{i}.png').write_bytes((digits / '0.png').read_bytes())
    left, normalize, turns = tmp_path / 'out.csv.incomplete', ImageReader.normalize, []

    def interrupt(self, pixels):
        turns.append(1)
        if len(turns) == 3:
            raise KeyboardInterrupt
        return normalize(self, pixels)
    with monkeypatch.context() as patch:
        patch.setattr(ImageReader, 'normalize', interrupt)
        assert resumed('--batch-size', '1')[0] == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ['0.png', '1.png', '2.png', left.name]
    code, said = resumed()
    assert code == 1 and 'holds results of a run that was cut: add --resume to go on, or delete it' in said[0]
    code, said = resumed('--resume', '--img-size', '40')
    assert code == 1 and 'holds results of other options, {' in said[0]
    with open(left, 'a') as file:
        file.write('{"image": "half')  # what a full disk leaves
    (tmp_path / '0.png').write_bytes(b'not read again')
    with sole_writer(tmp_path / 'out.csv'):
        code, said = resumed('--resume')
        assert code == 1 and said[0].endswith('out.csv: wait until it has ended.')
    assert resumed('--resume')[0] == 0
    rows = list(csv.DictReader(open(tmp_path / 'out.csv')))
    assert [row['image'] for row in rows] == [str(tmp_path / f'{i}.png') for i in range(3)]
    assert len({row['probability'] for row in rows}) == 1 and not left.exists()
    assert resumed()[0] == 1  # 0.png cannot be read any more


@pytest.mark.slow
def test_a_killed_run_loses_nothing(tmp_path):
    """A real SIGKILL; what is resumed is what a run without it gives."""
    extract_heldout(tmp_path / 'digits')
    command = [sys.executable, '-m', '_t2t_timm_cli', 'classify', 'digits', '--model', 'test_t2t_vit', '--json',
               '--embeddings', '--topk', '3', '--workers', '1']
    left = tmp_path / 'cut.json.incomplete'
    process = subprocess.Popen([*command, '--out', 'cut.json'], cwd=tmp_path)
    while not left.exists() or left.read_bytes().count(b'\n') < 100:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = left.read_bytes().count(b'\n') - 1
    assert 99 <= kept < 1000 and not (tmp_path / 'cut.json').exists()
    for name in ('cut.json', 'whole.json'):
        subprocess.run([*command, '--resume', '--out', name], cwd=tmp_path, check=True)
    cut, whole = (json.loads((tmp_path / name).read_text()) for name in ('cut.json', 'whole.json'))
    assert len(whole) == 1000 and [r['image'] for r in cut] == [r['image'] for r in whole]
    for a, b in zip(cut, whole, strict=True):
        assert a['embedding'] == pytest.approx(b['embedding'], rel=1e-4, abs=1e-5)
        assert [c['index'] for c in a['classes']] == [c['index'] for c in b['classes']]
        assert [c['probability'] for c in a['classes']] == pytest.approx(
            [c['probability'] for c in b['classes']], abs=1e-5)
    assert not left.exists()


class Bar:
    def update(self, number):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass
