"""Classification: the results are timm's, however they are asked for, and can be read whatever files are called."""
import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from unittest.mock import MagicMock

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models._hub import save_for_hf

from t2t_timm.cli import main
from t2t_timm.commands.classify import classify
from t2t_timm.commands.images import ImageReader
from t2t_timm.commands.results import write_results
from t2t_timm.files import sole_writer

ODD = ['a\nb.png', '\x1b[31mred.png', 'ü"\'.png', 'a,b.png']
LABELS = 'zero one two three four five six seven eight nine'.split()


@pytest.fixture(scope='module')
def five(digits, tmp_path_factory):
    """Folder of five digits."""
    folder = tmp_path_factory.mktemp('five')
    for i, file in enumerate(sorted(digits.iterdir())[::20]):
        shutil.copy(file, folder / f'{i}.png')
    return folder


@pytest.fixture(scope='module')
def odd(five, tmp_path_factory):
    """Folder of files with odd names, one of them not in UTF-8 where the system has such names."""
    folder, data = tmp_path_factory.mktemp('odd'), (five / '0.png').read_bytes()
    try:
        for name in [*ODD, os.fsdecode(b'caf\xe9.png')]:
            (folder / name).write_bytes(data)
    except OSError as e:
        pytest.skip(f'this system has no names that are not UTF-8; run it on Linux: {e}')
    return folder


@pytest.fixture
def run(capsys):
    """A function that runs the command, which must succeed, and gives what it prints."""
    def run(*argv):
        assert main(['classify', *map(str, argv), '--model', 'test_t2t_vit']) == 0
        return capsys.readouterr().out
    return run


@pytest.mark.parametrize('batch_size', [1, 7, 999])
def test_it_is_timms(digits, embedded, batch_size, run):
    results = json.loads(run(digits, '--topk', '99', '--batch-size', batch_size, '--json'))
    assert [r['image'] for r in results] == sorted(map(str, digits.iterdir()))
    transform = create_transform(**resolve_model_data_config(embedded))
    images = torch.stack([transform(Image.open(r['image']).convert('RGB')) for r in results])
    with torch.inference_mode():
        expected = embedded(images).softmax(dim=1)
    for result, row in zip(results, expected, strict=True):
        assert [c['label'] for c in result['classes']] == [LABELS[c['index']] for c in result['classes']]
        values = [c['probability'] for c in result['classes']]
        assert values == pytest.approx(row[[c['index'] for c in result['classes']]].tolist(), abs=1e-5)
        assert len(values) == 10 and values == sorted(values, reverse=True)


def test_image_size(five):
    model = timm.create_model('test_t2t_vit', pretrained=True, img_size=(40, 72)).eval()
    result, = classify([str(five / '0.png')], 'test_t2t_vit', 1, img_size=(40, 72))
    with torch.inference_mode():
        expected = model(ImageReader(model)(str(five / '0.png'))).softmax(dim=1).max().item()
    assert result['classes'][0]['probability'] == pytest.approx(expected, abs=1e-5)


def test_imagenet_names(tmp_path, capsys):
    torch.manual_seed(0)
    save_for_hf(timm.create_model('t2t_vit_7', depth=1), tmp_path / 'dir', safe_serialization=True)
    Image.new('RGB', (300, 200)).save(tmp_path / 'a.jpg')
    result, = classify([str(tmp_path / 'a.jpg')], f'local-dir:{tmp_path / "dir"}', 1000, depth=1)
    names = {c['index']: c['label'] for c in result['classes']}
    assert names[0] == 'tench, Tinca tinca' and names[999] == 'toilet tissue, toilet paper, bathroom tissue'


def test_globs_and_unreadable(five, tmp_path, capsys):
    """They are named in print, whatever they are called, and the others are answered."""
    shutil.copytree(five, tmp_path / 'images')
    for name in ('broken.png', '\x1b[31m.png'):
        (tmp_path / 'images' / name).write_bytes(b'\x89PNG\r\n\x1a\n and no more')
    (tmp_path / 'images' / 'notes.txt').write_text('no image, and not meant')
    folder = tmp_path / 'images'
    names = map(str, (folder / '[12].png', folder, folder / 'none.jpg'))
    assert main(['classify', *names, '--model', 'test_t2t_vit']) == 1
    out, err = capsys.readouterr()
    assert len([line for line in out.splitlines() if line.endswith('.png')]) == 7
    for name in ('broken.png', r'\x1b[31m.png', 'none.jpg'):
        assert f'{folder}{os.sep}{name}: cannot be read: ' in err
    assert f'Skipped 1 that has no extension of an image: {folder / "notes.txt"}.' in err and '\x1b' not in err


@pytest.mark.parametrize('args, words', [
    (['--model', 'test_t2t_vit.nope'], "test_t2t_vit has no tag 'nope'; its tags are test_t2t_vit.mnist."),
    (['--model', 't2t_vit_c_14'], 't2t_vit_c_14 has no pretrained weights: `t2t-timm models` lists'),
    (['--model', 't2t_vit_c_14.in1k'], "t2t_vit_c_14 has no tag 'in1k'; it has no tags."),
    (['--model', 'resnet18'], 'resnet18 is not a T2T-ViT'),
    (['--model', __file__], 'is a file or folder, not the name of a model: write local-dir:DIR'),
    (['--topk', '0'], '--topk should be 1 or more'),
])
def test_mistakes(five, mistake, args, words):
    assert words in mistake('classify', five, *args)


def test_an_empty_folder(tmp_path, mistake):
    assert 'There are no images in' in mistake('classify', tmp_path, '--model', 'test_t2t_vit')


def test_a_model_of_other_channels(five, tmp_path, mistake):
    save_for_hf(timm.create_model('test_t2t_vit', in_chans=4), tmp_path, safe_serialization=True)
    assert mistake('classify', five, '--model', f'local-dir:{tmp_path}').endswith(
        't2t-timm classify: Image files are read with 1 or 3 channels, but the model reads 4.\n')


@pytest.mark.parametrize('file, content, words', [
    ('config.json', b'{', 'Expecting property name'),
    ('config.json', b'{"architecture": "t2t_vit_7", "num_classes": 3}', 'does not fit|looks like test_t2t_vit'),
    ('model.safetensors', b'xx', 'Error while deserializing header'),
    ('model.safetensors', None, 'No suitable checkpoints'),
    ('config.json', None, 'Config file not found'),
])
def test_a_damaged_folder(five, tmp_path, embedded, mistake, file, content, words):
    save_for_hf(embedded, tmp_path, safe_serialization=True)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    name = re.escape(str(tmp_path))
    assert re.search(
        f'^t2t-timm classify: local-dir:{name} cannot be loaded: .*({words}).*; `t2t-timm verify {name}` says more.$',
        mistake('classify', five, '--model', f'local-dir:{tmp_path}'), re.MULTILINE)


def test_weights_that_are_damaged(five, tmp_path, embedded, mistake):
    torch.nn.init.constant_(embedded.head.bias, float('nan'))
    save_for_hf(embedded, tmp_path, safe_serialization=True)
    assert 'not finite' in mistake(
        'classify', five, '--model', f'local-dir:{tmp_path}', '--csv', '--out', tmp_path / 'a.csv')


def test_results_come_as_they_come(five, monkeypatch):
    seen = []

    class File(io.StringIO):
        def flush(self):
            seen.append(self.getvalue().count('.png'))

    def results():
        for i, result in enumerate(classify([str(five)], 'test_t2t_vit', batch_size=2)):
            assert len(seen) == i  # what was given before has been written
            yield result

    monkeypatch.setattr(sys, 'stdout', File())
    write_results(results(), 'text')
    assert seen == [1, 2, 3, 4, 5]


def test_json_and_csv_say_the_same(five, tmp_path, run):
    expected = json.loads(run(five, '--json', '--topk', '3'))
    rows = list(csv.DictReader(io.StringIO(run(five, '--csv', '--topk', '3'))))
    assert rows == [
        dict(image=r['image'], rank=str(rank), index=str(c['index']), label=c['label'],
             probability=f'{c["probability"]:.6f}')
        for r in expected for rank, c in enumerate(r['classes'], 1)]
    assert len(rows) == 15
    out = tmp_path / 'results.json'
    assert run(five, '--json', '--topk', '3', '--out', out) == f'{out}\n'
    assert json.loads(out.read_text()) == expected
    assert [p.name for p in tmp_path.iterdir()] == ['results.json']


def test_json_of_odd_names(odd, run):
    out = run(odd, '--json', '--topk', '1')
    assert out.isascii()
    names = {os.fsencode(r['image']) for r in json.loads(out)}
    assert names == {os.fsencode(p) for p in odd.iterdir()} and len(names) == 5


@pytest.mark.parametrize('form', [[], ['--csv']])
def test_odd_names_do_not_reach_the_terminal_raw(odd, run, form):
    out = run(odd, '--topk', '1', *form)
    assert all(c.isprintable() or c == '\n' for c in out)
    for name in (r'a\nb.png', r'\x1b[31mred.png', 'ü', r'caf\udce9.png'):
        assert name in out
    assert len(out.splitlines()) == (6 if form else 10)


def test_progress_leaves_results_alone(five, monkeypatch, run):
    bar = MagicMock()
    monkeypatch.setattr('t2t_timm.commands.classify.tqdm', bar)
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, 'isatty', lambda terminal=terminal: terminal)
        run(five)
    assert [call.kwargs['disable'] for call in bar.call_args_list] == [None, True]  # None: if stderr is a terminal


def test_the_same_file_twice(five):
    file = str(five / '0.png')
    assert [r['image'] for r in classify([file, file], 'test_t2t_vit')] == [file, file]


def test_workers_give_the_same(five, tmp_path):
    (tmp_path / 'text.png').write_text('text')
    Image.new('L', (1, 60000)).save(tmp_path / 'thin.png')
    names = [str(five), str(tmp_path)]
    here, there = (list(classify(names, 'test_t2t_vit', 3, 2, workers=workers)) for workers in (0, 2))
    assert here == there and [r['image'] for r in here if 'error' in r] == [
        str(tmp_path / 'text.png'), str(tmp_path / 'thin.png')]


def test_whatever_an_image_does_the_others_are_answered(five, monkeypatch):
    opened = Image.open

    def fail(file, *args):
        if str(file).endswith('2.png'):
            raise MemoryError
        if str(file).endswith('3.png'):
            raise KeyError('strange')
        return opened(file, *args)
    monkeypatch.setattr('PIL.Image.open', fail)
    results = list(classify([str(five)], 'test_t2t_vit', 1))
    assert {os.path.basename(r['image']): r.get('error') for r in results} == {
        '0.png': None, '1.png': None, '2.png': 'there is not enough memory for it', '3.png': "'strange'", '4.png': None}


def test_a_worker_that_is_killed_is_one_sentence(five, monkeypatch, mistake):
    if torch.multiprocessing.get_start_method() != 'fork':
        pytest.skip('workers see the patch only if they are forked: run it on Linux with Python 3.13 or older')
    monkeypatch.setattr(ImageReader, 'pixels', lambda *args: os.kill(os.getpid(), signal.SIGKILL))
    said = mistake('classify', five, '--model', 'test_t2t_vit', '--workers', '1')
    assert 'A process that reads images has ended (' in said and said.endswith('or a smaller --batch-size.\n')


def test_embeddings_are_those_of_timm(five):
    results = list(classify([str(five)], 'test_t2t_vit', 1, embeddings=True))
    model = timm.create_model('test_t2t_vit', pretrained=True, num_classes=0).eval()
    read = ImageReader(model)
    for result in results:
        with torch.inference_mode():
            expected = model(read(result['image']))[0]
        torch.testing.assert_close(torch.tensor(result['embedding']), expected, rtol=1e-4, atol=1e-5)
    bare, = classify([str(five / '0.png')], 'test_t2t_vit', embeddings=True, num_classes=0)
    assert bare['classes'] == [] and bare['embedding'] == pytest.approx(results[0]['embedding'], abs=1e-5)


def test_autocast(five):
    exact, rounded = (
        [c['probability'] for r in classify([str(five)], 'test_t2t_vit', 10, amp=amp)
         for c in sorted(r['classes'], key=lambda c: c['index'])] for amp in (None, torch.bfloat16))
    assert rounded == pytest.approx(exact, abs=0.05) and rounded != exact


def test_parquet_says_the_same_as_json(five, odd, tmp_path, run):
    parquet = pytest.importorskip('pyarrow.parquet', reason='pip install pyarrow')
    images = (five, odd)
    expected = json.loads(run(*images, '--json', '--topk', '3', '--embeddings'))
    run(*images, '--parquet', '--topk', '3', '--embeddings', '--out', tmp_path / 'a.parquet')
    rows = parquet.read_table(tmp_path / 'a.parquet').to_pylist()
    assert [row.pop('image') for row in rows] == [
        r['image'].encode('utf-8', 'backslashreplace').decode() for r in expected]
    for row, r in zip(rows, expected, strict=True):
        assert row.pop('embedding') == pytest.approx(r['embedding'], rel=1e-7)
        assert row == {key: [c[key] for c in r['classes']] for key in ('index', 'label', 'probability')}
    assert [p.name for p in tmp_path.iterdir()] == ['a.parquet']


def test_parquet_needs_pyarrow(five, monkeypatch, mistake):
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    assert mistake('classify', five, '--parquet', '--out', 'a.parquet') == (
        't2t-timm classify: Parquet needs pyarrow: pip install pyarrow\n')


def test_what_a_cut_run_leaves(five, tmp_path, monkeypatch, capsys):
    images = [shutil.copy(five / '0.png', tmp_path / f'{i}.png') for i in range(3)]

    def resumed(*options):
        code = main([
            'classify', *map(str, images), '--model', 'test_t2t_vit', '--topk', '1', '--csv', '--out',
            str(tmp_path / 'out.csv'), *options])
        return code, ''.join(capsys.readouterr().err.splitlines()[-1:])

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
    assert code == 1 and 'holds results of a run that was cut: add --resume to go on, or delete it' in said
    code, said = resumed('--resume', '--img-size', '40')
    assert code == 1 and 'holds results of other options, {' in said
    kept = left.read_bytes()
    for damaged in (b'\n', b'{}\n{"options": 1\n', b'{}\n[]\n', b'{}\nnull\n'):
        left.write_bytes(damaged + kept)
        assert resumed('--resume') == (1, f't2t-timm classify: {left} is damaged: delete it to begin again.')
    left.write_bytes(kept + b'{"image": "half')  # what a full disk leaves
    (tmp_path / '0.png').write_bytes(b'not read again')
    with sole_writer(tmp_path / 'out.csv'):
        code, said = resumed('--resume')
        assert code == 1 and said.endswith('out.csv: wait until it has ended.')
    assert resumed('--resume')[0] == 0
    rows = list(csv.DictReader(open(tmp_path / 'out.csv')))
    assert [row['image'] for row in rows] == list(map(str, images))
    assert len({row['probability'] for row in rows}) == 1 and not left.exists()
    assert resumed()[0] == 1  # 0.png cannot be read any more


@pytest.mark.slow
def test_a_killed_run_loses_nothing(heldout, tmp_path):
    """A real SIGKILL; what is resumed is what a run without it gives."""
    command = [sys.executable, '-m', '_t2t_timm_cli', 'classify', *sorted(heldout.iterdir())[:3], '--json',
               '--model', 'test_t2t_vit', '--embeddings', '--topk', '3', '--workers', '1']
    left = tmp_path / 'cut.json.incomplete'
    process = subprocess.Popen([*command, '--out', 'cut.json'], cwd=tmp_path)
    while not left.exists() or left.read_bytes().count(b'\n') < 40:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = left.read_bytes().count(b'\n') - 1
    assert 39 <= kept < 300 and not (tmp_path / 'cut.json').exists()
    for name in ('cut.json', 'whole.json'):
        subprocess.run([*command, '--resume', '--out', name], cwd=tmp_path, check=True)
    cut, whole = (json.loads((tmp_path / name).read_text()) for name in ('cut.json', 'whole.json'))
    assert len(whole) == 300 and [r['image'] for r in cut] == [r['image'] for r in whole]
    for a, b in zip(cut, whole, strict=True):
        assert a['embedding'] == pytest.approx(b['embedding'], rel=1e-4, abs=1e-5)
        assert {c['index']: c['probability'] for c in a['classes']} == pytest.approx(
            {c['index']: c['probability'] for c in b['classes']}, abs=1e-5)
    assert not left.exists()
