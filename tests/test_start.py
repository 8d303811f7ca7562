"""The first moments of a command: nothing heavy is imported for an answer that needs none, and Ctrl-C always works."""
import os
import signal
import subprocess
import sys

import pytest

from t2t_timm.cli import main

QUICK = [
    ['--help'], ['--version'], ['clasify'], ['classify', '--help'], ['recipe', 't2t_vit_14'], ['recipe', 'nothing']]
CLI = [sys.executable, '-m', '_t2t_timm_cli']


@pytest.mark.parametrize('argv', QUICK, ids=' '.join)
def test_answers_before_anything_heavy_is_imported(argv):
    done = subprocess.run([CLI[0], '-X', 'importtime', *CLI[1:], *argv], text=True, capture_output=True)
    imported = {line.split('|')[-1].strip() for line in done.stderr.splitlines() if line.startswith('import time:')}
    assert 'argparse' in imported and not imported & {'torch', 'timm', 'numpy', 'PIL', 'huggingface_hub'}
    assert 'Traceback' not in done.stderr
    assert done.stdout.startswith('t2t-timm ') or argv != ['--version']


def test_ctrl_c_while_packages_are_imported(tmp_path):
    # This package makes another error of it, as numpy does.
    (tmp_path / 'torch.py').write_text('if True:\n'
        '    import os, time\n'
        '    os.write(1, b"importing")\n'
        '    try:\n'
        '        time.sleep(60)\n'
        '    except KeyboardInterrupt as e:\n'
        '        raise ImportError("torch cannot be imported") from e\n')
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get('PYTHONPATH')])])
    process = subprocess.Popen(
        [*CLI, 'models'], env=dict(os.environ, PYTHONPATH=path), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(9) == b'importing'
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (-signal.SIGINT, b'', b'')


@pytest.mark.parametrize('before', [signal.default_int_handler, signal.SIG_DFL])
@pytest.mark.parametrize('error', [None, RuntimeError, ValueError])
def test_ctrl_c_in_a_command(monkeypatch, capsys, error, before):
    def press(*args):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            if error is None:
                raise
            raise error('the exporter failed') from None

    monkeypatch.setattr('t2t_timm.recipes.recipe_path', press)
    usual = signal.signal(signal.SIGINT, before)
    try:
        assert main(['recipe', 't2t_vit_14']) == 130
        assert signal.getsignal(signal.SIGINT) == before  # so that a second one ends the command without a traceback
    finally:
        signal.signal(signal.SIGINT, usual)
    assert capsys.readouterr().err == 't2t-timm recipe: interrupted\n'


@pytest.mark.parametrize('argv, codes', [
    (['--help'], (0, 141)),  # argparse itself takes no notice, unless the text is written later
    (['recipe'], (141,)),
    (['recipe', 't2t_vit_14'], (141,)),
])
def test_a_pipe_that_nobody_reads(argv, codes):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*CLI, *argv], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode in codes and done.stderr == b''


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='this system has no /dev/full')
def test_output_that_cannot_be_written():
    with open('/dev/full', 'w') as full:
        done = subprocess.run([*CLI, 'recipe'], stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, b't2t-timm recipe: standard output: No space left on device.\n')
