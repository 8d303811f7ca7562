"""docs/classify_ray.py as it stands, on this machine, with an actor that is killed at work."""
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from t2t_timm.commands.classify import classify

SCRIPT = Path(__file__).parents[2] / 'docs' / 'classify_ray.py'
AT_WORK = b'ray::MapWorker(MapBatches(Classifier)).submit'  # what Ray calls the process of an actor meanwhile


def kill_an_actor(process):
    """Kill the first actor that is at work; return its process, or None if there was none before the script ended."""
    while process.poll() is None:
        for file in Path('/proc').glob('[0-9]*/environ'):
            try:
                ours = f'RAY_TMPDIR={process.folder}\0'.encode() in file.read_bytes() + b'\0'
                if ours and (file.parent / 'cmdline').read_bytes().startswith(AT_WORK):
                    os.kill(int(file.parent.name), signal.SIGKILL)
                    return int(file.parent.name)
            except OSError:  # another user's, or gone
                pass
        time.sleep(0.01)
    return None


@pytest.mark.slow
def test_a_killed_actor_loses_no_image(heldout, tmp_path):
    pytest.importorskip('ray.data', reason="pip install 'ray[data]'")
    parquet = pytest.importorskip('pyarrow.parquet', reason='pip install pyarrow')
    if not Path('/proc/self/environ').exists():
        pytest.skip('processes are told apart by /proc: run it on Linux')
    (tmp_path / 'digits').mkdir()
    for i, file in enumerate(sorted(heldout.rglob('*.png'))[::2]):
        shutil.copy(file, tmp_path / 'digits' / f'{i:03d}.png')
    (tmp_path / 'digits' / 'text.png').write_text('text')
    with tempfile.TemporaryDirectory(prefix='ray-') as folder:  # its name is short, as those of sockets must be
        env = dict(os.environ, RAY_TMPDIR=folder, HOME=folder, OMP_NUM_THREADS='1')
        with open(tmp_path / 'log', 'w') as log:
            process = subprocess.Popen(
                [sys.executable, SCRIPT, 'out', 'digits', '--model', 'test_t2t_vit', '--batch-size', '16',
                 '--topk', '10'],
                cwd=tmp_path, env=env, stdout=log, stderr=log)
            process.folder = folder
            killed = kill_an_actor(process)
            assert process.wait() == 0, (tmp_path / 'log').read_text()[-5000:]
    assert killed is not None and f'Worker PID: {killed} ' in (tmp_path / 'log').read_text()
    rows = parquet.read_table(tmp_path / 'out').to_pylist()
    bad, = (row for row in rows if row['error'])
    assert bad['image'] == str(tmp_path / 'digits' / 'text.png') and 'cannot identify' in bad['error']
    assert bad['index'] == bad['label'] == bad['probability'] == []
    found = {row['image']: row for row in rows if not row['error']}
    assert len(rows) == 501 and len(found) == 500
    for result in classify([str(tmp_path / 'digits' / '*.png')], 'test_t2t_vit', topk=10):
        if 'error' not in result:
            row = found[result['image']]
            assert row['probability'] == sorted(row['probability'], reverse=True)
            expected = {c['index']: c['probability'] for c in result['classes']}
            assert dict(zip(row['index'], row['probability'], strict=True)) == pytest.approx(expected, abs=1e-5)
            assert row['label'] == [{c['index']: c['label'] for c in result['classes']}[i] for i in row['index']]
