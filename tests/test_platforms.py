"""What Windows and macOS do otherwise, as far as it can be simulated: consoles, names, files that are open."""
import io
import os
import subprocess
import sys
from pathlib import Path

import published
import pytest
import torch

from t2t_timm.cli import main
from t2t_timm.hub.convert import convert

NAME = 'два слова 漢字'


@pytest.fixture
def folder(tmp_path):
    """A folder whose name has spaces and letters that few consoles have, with a checkpoint in it."""
    folder = tmp_path / NAME
    folder.mkdir()
    torch.save(published.tiny(), folder / f'{NAME}.pth')
    return folder


@pytest.mark.parametrize('encoding', ['cp1252', 'ascii'])
def test_a_console_without_the_letters(folder, encoding, monkeypatch):
    monkeypatch.setattr(sys, 'stdout', io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    assert main(['verify', str(folder / f'{NAME}.pth')]) == 0
    sys.stdout.flush()
    printed = sys.stdout.buffer.getvalue().decode(encoding)
    assert 'loads strictly: yes' in printed and r'\u6f22\u5b57.pth' in printed


@pytest.mark.slow
def test_ascii_in_which_python_cannot_even_read_the_name(folder):
    done = subprocess.run(
        [sys.executable, '-m', '_t2t_timm_cli', 'convert', folder / f'{NAME}.pth', '--model', 'test_t2t_vit', '--out',
         folder / 'out'],
        env=dict(os.environ, LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0'), capture_output=True)
    assert done.returncode == 0 and rb'\udc' in done.stderr, done.stderr
    assert (folder / 'out' / 'model.safetensors').is_file()


@pytest.mark.parametrize('name', ['replace', 'mkdir'])
def test_a_file_that_is_open_or_a_folder_that_may_not_be_written(folder, name, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise PermissionError(13, 'Permission denied', args[0])

    monkeypatch.setattr(os, name, refuse)  # Windows renames nothing that is open; a folder may be read-only
    before = sorted(folder.iterdir())
    assert main(['convert', str(folder / f'{NAME}.pth'), '--model', 'test_t2t_vit', '--out', str(folder / 'out')]) == 1
    assert 'Permission denied' in capsys.readouterr().err.splitlines()[-1]
    assert sorted(folder.iterdir()) == before


def test_text_has_the_same_ends_of_lines_everywhere(folder, monkeypatch):
    written = []
    write_text = Path.write_text
    monkeypatch.setattr(Path, 'write_text', lambda self, *args, **kwargs: (
        written.append((self.name, kwargs.get('newline'))), write_text(self, *args, **kwargs))[1])
    convert(folder / f'{NAME}.pth', 'test_t2t_vit', folder / 'out')
    ours = dict(written)  # the last of each name: timm writes config.json first, as its own function does
    assert (ours['README.md'], ours['config.json']) == ('\n', '\n')
