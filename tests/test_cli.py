"""The commands, run as a user runs them: output, exit codes, one sentence for a mistake."""
import argparse
import errno
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from t2t_timm.arguments import make_parser
from t2t_timm.cli import main


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a checkpoint, an image and a text that is called one."""
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model('test_t2t_vit').state_dict(), 'a.pth')
    Image.new('L', (28, 28)).save('a.png')
    Path('text.jpg').write_text('text')
    return tmp_path


def test_models(capsys):
    assert main(['models']) == 0
    assert 'test_t2t_vit.mnist' in capsys.readouterr().out


@pytest.mark.parametrize('argv, words', [
    (['classify', 'a.png', '--model', 'test_t2t_vitt'], "Did you mean test_t2t_vit or test_t2t_vit.mnist?"),
    (['classify', 'a.png', '--model', 'T2T-ViT-14-384'], 'Did you mean t2t_vit_14_384 or '),
    (['classify', 'a.png', '--model', 'nothing_like_it'],
     "There is no architecture 'nothing_like_it'; there are t2t_vit_7, t2t_vit_10, "),
    (['convert', 'a.png', '--model', 't2t_vit14', '--out', 'out'], 'Did you mean t2t_vit_14 or '),
    (['verify', 't2t_vit_14.in1'], 'Did you mean t2t_vit_14.in1k or '),
    (['publish', 't2t_vit_14.inlk', '--dry-run'], 'Did you mean t2t_vit_14.in1k or '),
    (['recipe', 't2t_vit_14_cifar'], 'Did you mean t2t_vit_14_cifar10 or '),
])
def test_misspelt_names_bring_a_suggestion(here, mistake, argv, words):
    err = mistake(*argv)
    assert words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize('argv, words', [
    (['attention', 'none.jpg', '--out', 'a.png'], 'none.jpg cannot be read as an image: No such file or directory'),
    (['features', 'text.jpg', '--out', 'a.png'], 'text.jpg cannot be read as an image: cannot identify image file'),
    (['attention', 'a.png', '--out', 'x.jpg'], 'x.jpg ends in .jpg, but the file is a .png.'),
    (['features', 'a.png', '--out', 'nowhere/a.png'], 'There is no folder nowhere to write a.png to.'),
    (['classify', 'none.jpg'], 'There is no file none.jpg.'),
    (['classify', 'a.png', '--out', 'nowhere/a.txt'], 'There is no folder nowhere to write a.txt to.'),
    (['classify', 'a.png', '--out', '.'], '. is a folder: name a file to write.'),
    (['classify', 'a.png', '--json', '--out', 'a.csv'], 'a.csv ends in .csv, but the file is a .json.'),
    (['classify', 'a.png', '--batch-size', '0'], '--batch-size should be 1 or more, not 0.'),
    (['classify', 'a.png', '--device', 'toaster'], '--device toaster cannot be used: '),
    (['classify', 'a.png', '--device', 'meta'], '--device meta cannot be used: '),
    (['classify', 'a.png', '--workers', '-1'], '--workers should be 0 or more, not -1.'),
    (['classify', 'a.png', '--resume'], '--resume needs --out FILE.'),
    (['classify', 'a.png', '--parquet'], '--parquet needs --out FILE.'),
    (['classify', 'a.png', '--csv', '--embeddings'], '--embeddings needs --json or --parquet'),
    (['classify', 'a.png', '--img-size', '2'], '--img-size takes a height and a width'),
])
def test_arguments_are_checked_before_weights_are_fetched(here, monkeypatch, mistake, argv, words):
    def fetch(*args, **kwargs):
        raise AssertionError('weights were fetched')

    monkeypatch.setattr('timm.create_model', fetch)
    err = mistake(*argv)
    assert words in err and len(err.splitlines()) == 1
    assert sorted(p.name for p in here.iterdir()) == ['a.png', 'a.pth', 'text.jpg']


def test_a_missing_matplotlib_is_told_before_weights_are_fetched(monkeypatch, mistake):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    assert 'pip install matplotlib' in mistake('attention', 'nothing.png', '--out', 'a.png')


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
def test_an_error_of_the_system_names_what_the_user_named(here, monkeypatch, mistake, argv):
    def refuse(self, **kwargs):
        raise PermissionError(errno.EACCES, 'Permission denied', '.out-kqd3')

    monkeypatch.setattr('t2t_timm.files.TemporaryDirectory.__init__', refuse)
    monkeypatch.setattr('t2t_timm.files.TemporaryDirectory.__del__', lambda self: None, raising=False)
    assert mistake(*argv).splitlines()[-1] == f't2t-timm {argv[0]}: out: Permission denied.'


@pytest.mark.parametrize('argv, fetch', [
    (['classify', 'a.png'], 'timm.create_model'), (['verify', 't2t_vit_14.in1k'], 't2t_timm.hub.verify.verify')])
def test_a_read_only_home_says_what_to_set(here, monkeypatch, mistake, argv, fetch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, 'Permission denied', str(here / '.cache'))

    for variable in ('HOME', 'USERPROFILE'):
        monkeypatch.setenv(variable, str(here))
    monkeypatch.setattr(fetch, refuse)
    assert mistake(*argv).endswith(
        f'{here / ".cache"}: Permission denied; set TORCH_HOME and HF_HOME to folders for downloads that you may '
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


@pytest.mark.parametrize('command', [pytest.param(c, marks=pytest.mark.slow) if c in ('onnx', 'export') else c
                                     for c in WRITING])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(here, mistake, file_limit, command):
    if command == 'onnx':
        pytest.importorskip('onnxscript', reason='pip install t2t-timm[onnx]')
    before = set(here.iterdir())
    file_limit(50)
    err = mistake(*WRITING[command])
    file_limit()
    assert re.fullmatch(
        rf't2t-timm {WRITING[command][0]}: {WRITING[command][-1]}\S*: File too large\.', err.splitlines()[-1])
    assert set(here.iterdir()) == before | ({here / 'out'} if command == 'cards' else set())


@pytest.mark.parametrize('command', [c for c in WRITING if c not in ('onnx', 'export')])
def test_what_is_written_has_the_rights_of_any_other_file(here, command):
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
def test_misspelt_commands_and_options_bring_a_suggestion(capsys, argv, words):
    with pytest.raises(SystemExit, match='2'):
        main(argv)
    assert re.search(words + '$', capsys.readouterr().err)


def test_commands_that_prepare_say_the_next_step(here, capsys):
    for command, step in (
            ('digits', '`t2t-timm classify out/3_three --model test_t2t_vit --topk 1`'),
            ('convert', '`t2t-timm verify a.pth out`, or `t2t-timm classify IMAGE --model local-dir:out`'),
    ):
        assert main(WRITING[command]) == 0
        out, err = capsys.readouterr()
        assert out == 'out\n' and err.splitlines()[-1] == f'Next: {step}'
        shutil.rmtree('out')


@pytest.mark.parametrize('command', ['convert', 'digits', 'cards'])
def test_no_command_makes_the_parents_of_its_folder(here, mistake, command):
    argv = [arg if arg != 'out' else 'no/out' for arg in WRITING[command]]
    assert mistake(*argv).endswith('There is no folder no to write out to.\n')
    assert not (here / 'no').exists()
