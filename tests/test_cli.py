"""The commands, run as a user runs them: output, exit codes, one sentence for a mistake."""
import argparse
import errno
import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models._hub import save_for_hf

from t2t_timm.arguments import make_parser
from t2t_timm.cli import main
from t2t_timm.commands.images import find_images
from t2t_timm.digits import extract_heldout

DIGITS = 'zero one two three four five six seven eight nine'.split()


@pytest.fixture(scope='module')
def heldout(tmp_path_factory) -> Path:
    return extract_heldout(tmp_path_factory.mktemp('digits') / 'digits')


@pytest.fixture
def images(heldout, tmp_path) -> Path:
    """Three images per class, in a tree."""
    for folder in sorted(heldout.iterdir()):
        (tmp_path / 'images' / folder.name).mkdir(parents=True)
        for file in sorted(folder.iterdir())[:3]:
            shutil.copy(file, tmp_path / 'images' / folder.name)
    return tmp_path / 'images'


def mistake(capsys, *argv: str) -> str:
    """Run a command that must fail, and return the one sentence that it says."""
    assert main(list(argv)) == 1
    out, err = capsys.readouterr()
    assert out == '' and 'Traceback' not in err
    return err


def test_classify_json(images, capsys):
    assert main(['classify', str(images), '--model', 'test_t2t_vit', '--topk', '2', '--json']) == 0
    results = json.loads(capsys.readouterr().out)
    assert [r['image'] for r in results] == sorted(str(p) for p in images.rglob('*.png'))
    right = 0
    for result in results:
        first, second = result['classes']
        assert 1 >= first['probability'] >= second['probability'] >= 0
        assert first['label'] == DIGITS[first['index']]
        right += f"{first['index']}_{first['label']}" == Path(result['image']).parent.name
    assert right >= 28


def test_classify_is_timms(images, capsys):
    file = next(images.rglob('*.png'))
    assert main(['classify', str(file), '--model', 'test_t2t_vit.mnist', '--topk', '99', '--json']) == 0
    classes = json.loads(capsys.readouterr().out)[0]['classes']
    model = timm.create_model('test_t2t_vit', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        expected = model(transform(Image.open(file).convert('RGB')).unsqueeze(0)).softmax(dim=1)[0]
    assert len(classes) == 10
    for c in classes:
        assert c['probability'] == pytest.approx(expected[c['index']].item(), abs=1e-5)


def test_classify_text_globs_and_unreadable(images, tmp_path, capsys):
    (images / 'broken.png').write_bytes(b'\x89PNG\r\n\x1a\n and no more')
    (images / 'notes.txt').write_text('no image, and not meant')
    args = ['classify', str(images / '7_*' / '*.png'), str(images), str(images / 'none.jpg'), '--model', 'test_t2t_vit']
    assert main(args) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len([line for line in lines if line.endswith('.png')]) == 33
    assert lines[1].endswith('%  seven (7)')
    assert f'{images / "broken.png"}: cannot be read: ' in err
    assert f'{images / "none.jpg"}: cannot be read: ' in err
    assert f'Skipped 1 that has no extension of an image: {images / "notes.txt"}.' in err


def test_classify_other_kinds_of_images(tmp_path, capsys):
    for i, mode in enumerate(('L', 'RGBA', 'P', 'CMYK', '1')):
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).convert(mode).save(tmp_path / f'{i}.tiff')
    assert main(['classify', str(tmp_path / '*.tiff'), '--model', 'test_t2t_vit', '--topk', '1']) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10


def test_classify_imagenet_names(tmp_path, capsys):
    torch.manual_seed(0)
    torch.save(timm.create_model('t2t_vit_7').state_dict(), tmp_path / 'a.pth')
    assert main(['convert', str(tmp_path / 'a.pth'), '--model', 't2t_vit_7', '--out', str(tmp_path / 'dir')]) == 0
    Image.new('RGB', (300, 200)).save(tmp_path / 'a.jpg')
    capsys.readouterr()
    model = f'local-dir:{tmp_path / "dir"}'
    assert main(['classify', str(tmp_path / 'a.jpg'), '--model', model, '--topk', '1000', '--json']) == 0
    names = {c['index']: c['label'] for c in json.loads(capsys.readouterr().out)[0]['classes']}
    assert names[0] == 'tench, Tinca tinca' and names[999] == 'toilet tissue, toilet paper, bathroom tissue'


@pytest.mark.parametrize('args, words', [
    (['--model', 'no_such_model'], 'no_such_model'),
    (['--model', 'test_t2t_vit.nope'], "test_t2t_vit has no tag 'nope'; its tags are test_t2t_vit.mnist."),
    (['--model', 't2t_vit_c_14'], 't2t_vit_c_14 has no pretrained weights: `t2t-timm models` lists'),
    (['--model', 't2t_vit_c_14.in1k'], "t2t_vit_c_14 has no tag 'in1k'; it has no tags."),
    (['--model', 'resnet18'], 'resnet18 is not a T2T-ViT'),
    (['--model', __file__], 'is a file or folder, not the name of a model: write local-dir:DIR'),
    (['--model', 'test_t2t_vit', '--topk', '0'], '--topk should be 1 or more'),
])
def test_classify_mistakes(images, capsys, args, words):
    assert words in mistake(capsys, 'classify', str(images), *args)


def test_classify_empty_folder(tmp_path, capsys):
    assert 'There are no images in' in mistake(capsys, 'classify', str(tmp_path), '--model', 'test_t2t_vit')


def test_classify_by_a_model_of_other_channels(images, tmp_path, capsys):
    torch.save(timm.create_model('test_t2t_vit', in_chans=4).state_dict(), tmp_path / 'a.pth')
    assert main(['convert', str(tmp_path / 'a.pth'), '--model', 'test_t2t_vit', '--out', str(tmp_path / 'dir')]) == 0
    capsys.readouterr()
    err = mistake(capsys, 'classify', str(images), '--model', f'local-dir:{tmp_path / "dir"}')
    assert err == 't2t-timm classify: Image files are read with 1 or 3 channels, but the model reads 4.\n'


@pytest.mark.parametrize('file, content, words', [
    ('config.json', b'{', 'Expecting property name'),
    ('config.json', b'{"architecture": "t2t_vit_7", "num_classes": 3}', 'does not fit|looks like test_t2t_vit'),
    ('model.safetensors', b'xx', 'Error while deserializing header'),
    ('model.safetensors', None, 'No suitable checkpoints'),
    ('config.json', None, 'Config file not found'),
])
def test_classify_by_a_damaged_folder(images, tmp_path, capsys, file, content, words):
    model, folder = timm.create_model('test_t2t_vit', pretrained=True), tmp_path / 'dir'
    save_for_hf(model, folder, safe_serialization=True)
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    err = mistake(capsys, 'classify', str(images), '--model', f'local-dir:{folder}').splitlines()[-1]
    start, end = f't2t-timm classify: local-dir:{folder} cannot be loaded: ', f'; `t2t-timm verify {folder}` says more.'
    assert err.startswith(start) and err.endswith(end) and re.search(words, err), err


def test_find_images(tmp_path):
    for name in ('b/2.jpg', 'b/c/1.PNG', 'a.txt', '[x].png'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    folder = str(tmp_path)
    assert find_images([folder]) == [f'{folder}/[x].png', f'{folder}/b/2.jpg', f'{folder}/b/c/1.PNG']
    assert find_images([f'{folder}/[x].png']) == [f'{folder}/[x].png']  # a name, though it looks like a glob
    assert find_images([f'{folder}/**/*.jpg', f'{folder}/*.gif']) == [f'{folder}/b/2.jpg', f'{folder}/*.gif']


def test_convert_and_verify(tmp_path, capsys):
    torch.manual_seed(0)
    state_dict = timm.create_model('test_t2t_vit').state_dict()
    file, out = str(tmp_path / 'a.pth'), str(tmp_path / 'out')
    torch.save(state_dict, file)
    assert main(['convert', file, '--model', 'test_t2t_vit', '--out', out]) == 0
    assert capsys.readouterr().out == f'{out}\n'
    assert 'not empty' in mistake(capsys, 'convert', file, '--model', 'test_t2t_vit', '--out', out)
    assert main(['verify', out, file]) == 0
    assert 'largest difference of the logits: 0' in capsys.readouterr().out
    assert main(['verify', out, 'test_t2t_vit.mnist']) == 1
    assert 'more than 0.0001' in capsys.readouterr().out
    assert 'is neither a folder, nor a file, nor a tag' in mistake(capsys, 'verify', 'nothing')


def test_verify_tag(capsys):
    assert main(['verify', 'test_t2t_vit.mnist']) == 0
    out = capsys.readouterr().out
    assert 'a82210348887a47ab25c913a977788891149df9545a3cc9cb8eee078936247bf' in out
    assert 'loads strictly: yes' in out


def test_convert_mistake_leaves_nothing(tmp_path, capsys):
    (tmp_path / 'a.pth').write_bytes(b'nonsense')
    err = mistake(
        capsys, 'convert', str(tmp_path / 'a.pth'), '--model', 'test_t2t_vit', '--out', str(tmp_path / 'out'))
    assert err.startswith('t2t-timm convert: ') and len(err.splitlines()) == 1
    assert not (tmp_path / 'out').exists()


def test_cards_check(tmp_path, capsys):
    (tmp_path / 'old.md').write_text('of no tag')
    err = mistake(capsys, 'cards', '--check', '--out', str(tmp_path))
    assert 'old.md' in err and 't2t_vit_14.in1k.md' in err
    assert [p.name for p in tmp_path.iterdir()] == ['old.md']


def test_models(capsys):
    assert main(['models']) == 0
    assert 'test_t2t_vit.mnist' in capsys.readouterr().out


def test_interrupt(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr('t2t_timm.commands.classify.classify', interrupted)
    assert main(['classify', 'a.jpg']) == 130
    assert capsys.readouterr().err == 't2t-timm classify: interrupted\n'


@pytest.mark.parametrize('argv, words', [
    (['classify', 'IMAGE', '--model', 'test_t2t_vitt'], "Did you mean test_t2t_vit or test_t2t_vit.mnist?"),
    (['classify', 'IMAGE', '--model', 'T2T-ViT-14-384'], 'Did you mean t2t_vit_14_384 or '),
    (['classify', 'IMAGE', '--model', 'nothing_like_it'],
     "There is no architecture 'nothing_like_it'; there are t2t_vit_7, t2t_vit_10, "),
    (['convert', 'IMAGE', '--model', 't2t_vit14', '--out', 'out'], 'Did you mean t2t_vit_14 or '),
    (['verify', 't2t_vit_14.in1'], 'Did you mean t2t_vit_14.in1k or '),
    (['publish', 't2t_vit_14.inlk', '--dry-run'], 'Did you mean t2t_vit_14.in1k or '),
    (['recipe', 't2t_vit_14_cifar'], 'Did you mean t2t_vit_14_cifar10 or '),
])
def test_misspelt_names_bring_the_nearest(tmp_path, capsys, argv, words):
    Image.new('RGB', (9, 9)).save(tmp_path / 'a.png')
    err = mistake(capsys, *(str(tmp_path / 'a.png') if arg == 'IMAGE' else arg for arg in argv))
    assert words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize('argv, words', [
    (['export', '--format', 'nope', '--out', 'a.onnx'], "Unknown format 'nope': use one of onnx, "),
    (['export', '--out', 'nowhere/a.onnx'], 'There is no folder nowhere to write a.onnx to.'),
    (['export', '--out', 'wrong.pt'], 'wrong.pt ends in .pt, but the file is a .onnx.'),
    (['export', '--format', 'torchscript', '--out', 'a.onnx'], 'a.onnx ends in .onnx, but the file is a .pt.'),
    (['export', '--out', 'a.onnx', '--quantize', 'int8', '--calibration', 'empty'], 'There are no images in empty'),
    (['attention', 'none.jpg', '--out', 'a.png'], 'none.jpg cannot be read as an image: No such file or directory'),
    (['features', 'text.jpg', '--out', 'a.png'], 'text.jpg cannot be read as an image: cannot identify image file'),
    (['attention', 'image.png', '--out', 'x.jpg'], 'x.jpg ends in .jpg, but the file is a .png.'),
    (['features', 'image.png', '--out', 'nowhere/a.png'], 'There is no folder nowhere to write a.png to.'),
    (['classify', 'none.jpg'], 'There is no file none.jpg.'),
    (['classify', 'image.png', '--out', 'nowhere/a.txt'], 'There is no folder nowhere to write a.txt to.'),
    (['classify', 'image.png', '--json', '--out', 'a.csv'], 'a.csv ends in .csv, but the file is a .json.'),
    (['classify', 'image.png', '--batch-size', '0'], '--batch-size should be 1 or more, not 0.'),
    (['classify', 'image.png', '--device', 'toaster'], '--device toaster cannot be used: '),
    (['classify', 'image.png', '--device', 'meta'], '--device meta cannot be used: '),
    (['classify', 'image.png', '--workers', '-1'], '--workers should be 0 or more, not -1.'),
    (['classify', 'image.png', '--resume'], '--resume needs --out FILE.'),
    (['classify', 'image.png', '--parquet'], '--parquet needs --out FILE.'),
    (['classify', 'image.png', '--csv', '--embeddings'], '--embeddings needs --json or --parquet'),
    (['classify', 'image.png', '--img-size', '2'], '--img-size takes a height and a width'),
])
def test_arguments_are_checked_before_weights_are_fetched(tmp_path, monkeypatch, capsys, argv, words):
    def fetch(*args, **kwargs):
        raise AssertionError('weights were fetched')

    monkeypatch.setattr('timm.create_model', fetch)
    monkeypatch.chdir(tmp_path)
    Image.new('RGB', (9, 9)).save('image.png')
    Path('text.jpg').write_text('text')
    Path('empty').mkdir()
    argv[1:1] = ['t2t_vit_14'] if argv[0] == 'export' else []
    err = mistake(capsys, *argv)
    assert words in err and len(err.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ['empty', 'image.png', 'text.jpg']


def test_a_missing_matplotlib_is_told_before_weights_are_fetched(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert 'pip install matplotlib' in mistake(capsys, 'attention', 'nothing.png', '--out', 'a.png')


def test_every_command_shows_examples_that_it_takes():
    parser = make_parser()
    commands, = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        examples = re.findall(rf'^  t2t-timm ({name}.*)$', command.format_help(), re.MULTILINE)
        assert examples, name
        for example in examples:
            assert parser.parse_args(example.split()).run


@pytest.mark.parametrize('argv', [
    ['convert', 'a.pth', '--model', 'test_t2t_vit', '--out', 'out'],
    ['digits', 'out'],
    ['export', 'test_t2t_vit', '--untrained', '--format', 'torchscript', '--out', 'out'],
])
def test_an_error_of_the_system_names_what_the_user_named(tmp_path, monkeypatch, capsys, argv):
    def refuse(self, **kwargs):
        raise PermissionError(errno.EACCES, 'Permission denied', '.out-kqd3')

    monkeypatch.setattr('t2t_timm.files.TemporaryDirectory.__init__', refuse)
    monkeypatch.setattr('t2t_timm.files.TemporaryDirectory.__del__', lambda self: None, raising=False)
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model('test_t2t_vit').state_dict(), 'a.pth')
    assert mistake(capsys, *argv).splitlines()[-1] == f't2t-timm {argv[0]}: out: Permission denied.'


@pytest.mark.parametrize('argv, fetch', [
    (['classify', 'a.png'], 'timm.create_model'), (['verify', 't2t_vit_14.in1k'], 't2t_timm.hub.verify.verify')])
def test_a_read_only_home_says_what_to_set(tmp_path, monkeypatch, capsys, argv, fetch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, 'Permission denied', str(tmp_path / '.cache'))

    for variable in ('HOME', 'USERPROFILE'):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr(fetch, refuse)
    monkeypatch.chdir(tmp_path)
    Image.new('L', (28, 28)).save('a.png')
    assert mistake(capsys, *argv).endswith(
        f'{tmp_path / ".cache"}: Permission denied; set TORCH_HOME and HF_HOME to folders for downloads that you may '
        'write to.\n')


WRITING = {
    'convert': ['convert', 'a.pth', '--model', 'test_t2t_vit', '--out', 'out'],
    'digits': ['digits', 'out'],
    'torchscript': ['export', 'test_t2t_vit', '--untrained', '--format', 'torchscript', '--out', 'out.pt'],
    'export': ['export', 'test_t2t_vit', '--untrained', '--format', 'export', '--out', 'out.pt2'],
    'onnx': ['export', 'test_t2t_vit', '--untrained', '--out', 'out.onnx'],
    'attention': ['attention', 'a.png', '--model', 'test_t2t_vit', '--out', 'out.png'],
    'classify': ['classify', 'a.png', '--model', 'test_t2t_vit', '--out', 'out.txt'],
    'cards': ['cards', '--out', 'out'],
}


@pytest.fixture
def writing(tmp_path, monkeypatch):
    """What the commands of WRITING read, in the current folder."""
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model('test_t2t_vit').state_dict(), 'a.pth')
    Image.new('L', (28, 28)).save('a.png')
    return tmp_path


def packages_for(command):
    if command == 'attention':
        pytest.importorskip('matplotlib', reason='pip install t2t-timm[plot]')
    if command == 'onnx':
        pytest.importorskip('onnxscript', reason='pip install t2t-timm[onnx]')


@pytest.mark.parametrize('command', [pytest.param(c, marks=pytest.mark.slow) if c in ('onnx', 'export') else c
                                     for c in WRITING])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(writing, capsys, command):
    resource = pytest.importorskip('resource', reason='Windows limits no files: run it on Linux or macOS')
    packages_for(command)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        err = mistake(capsys, *WRITING[command])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert re.fullmatch(
        rf't2t-timm {WRITING[command][0]}: {WRITING[command][-1]}\S*: File too large\.', err.splitlines()[-1])
    left = {p.name for p in writing.iterdir()}
    assert left == ({'a.pth', 'a.png', 'out'} if command == 'cards' else {'a.pth', 'a.png'})


@pytest.mark.parametrize('command', [pytest.param(c, marks=pytest.mark.slow) if c in ('onnx', 'export') else c
                                     for c in WRITING])
def test_what_is_written_has_the_rights_of_any_other_file(writing, command):
    packages_for(command)
    before = os.umask(0o027)
    try:
        assert main(WRITING[command]) == 0
    finally:
        os.umask(before)
    out = Path(WRITING[command][-1])
    for path in (out, *out.rglob('*')):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


def test_readme_has_every_command_in_the_order_of_help():
    readme = (Path(__file__).parents[1] / 'README.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| `t2t-timm ([\w-]+)([^`]*)` \|', readme, re.MULTILINE)
    commands, = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert [name for name, _ in rows] == list(commands.choices)
    for name, arguments in rows:
        example = re.sub(r'\[([A-Z]+).*?\]', r'\1', arguments).split()  # as `--help` writes what may be left out
        assert commands.choices[name].parse_args(example).run


def test_readme_links_lead_somewhere():
    readme = (Path(__file__).parents[1] / 'README.md').read_text(encoding='utf-8')
    links = re.findall(r'\]\(([^)]*)\)', readme)
    assert links and all(
        link.startswith('https://') or (Path(__file__).parents[1] / link).exists() for link in links)


@pytest.fixture(autouse=True)
def quiet():
    """Leave logging as it was found: main() configures it."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


def test_an_unknown_option_shows_the_usage_of_its_command(capsys):
    with pytest.raises(SystemExit, match='2'):
        main(['classify', 'a.png', '--top-k', '3'])
    err = capsys.readouterr().err
    assert 'usage: t2t-timm classify' in err and '--topk K' in err
    assert err.endswith('t2t-timm classify: error: unrecognized arguments: --top-k 3. Did you mean --topk?\n')


@pytest.mark.parametrize('argv, words', [
    (['clasify', 'a.png'], r"invalid choice: 'clasify' \(choose from .*\)\. Did you mean classify\?\n"),
    (['val_tree'], r"invalid choice: 'val_tree' \(choose from .*\)\. Did you mean val-tree\?\n"),
    (['classify', 'a.png', '--mod', 'x', '--zzz'], r'unrecognized arguments: --zzz\n'),  # --mod is --model
    (['zzz'], r"invalid choice: 'zzz' \(choose from .*\)\n"),
])
def test_misspelt_commands_and_options_name_the_nearest(capsys, argv, words):
    with pytest.raises(SystemExit, match='2'):
        main(argv)
    assert re.search(words + '$', capsys.readouterr().err)


def test_commands_that_prepare_say_the_next_step(writing, capsys):
    for command, step in (
            ('digits', '`t2t-timm classify out/3_three --model test_t2t_vit --topk 1`'),
            ('convert', '`t2t-timm verify a.pth out`, or `t2t-timm classify IMAGE --model local-dir:out`'),
    ):
        assert main(WRITING[command]) == 0
        out, err = capsys.readouterr()
        assert out == 'out\n' and err.splitlines()[-1] == f'Next: {step}'
        shutil.rmtree('out')


@pytest.mark.parametrize('command', ['convert', 'digits', 'cards'])
def test_no_command_makes_the_parents_of_its_folder(writing, capsys, command):
    argv = [arg if arg != 'out' else 'no/out' for arg in WRITING[command]]
    assert mistake(capsys, *argv).endswith(f'There is no folder {writing / "no"} to make out in.\n')
    assert not (writing / 'no').exists()
