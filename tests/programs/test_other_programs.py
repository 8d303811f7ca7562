"""timm's other programs: inference, benchmark, ONNX export and validation, checkpoint averaging and cleaning."""
import csv
import re

import pytest
import timm
from pages import stated, top1

pytestmark = pytest.mark.slow


def test_inference(page):
    pytest.importorskip('pandas', reason='inference.py needs pandas: pip install pandas')
    page.run(page.command('--results-file predictions.csv'))
    with open(page.folder / 'predictions.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 200
    names = timm.get_pretrained_cfg('test_t2t_vit').label_names
    indices = [int(re.match(r'\[? *(\d+)', row['index'])[1]) for row in rows]
    assert all(names[i] in row['label'] for i, row in zip(indices, rows, strict=True))
    assert sum(row['filename'].startswith(f'{i}_') for i, row in zip(indices, rows, strict=True)) > 190


def test_benchmark(page):
    page.run(page.command('benchmark.py'))
    assert '\ntest_t2t_vit,' in (page.folder / 'benchmark.csv').read_text()


def test_onnx(page):
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(name, reason='pip install t2t-timm[onnx]')
    page.run(page.command('onnx_export.py'))
    command = page.command('onnx_validate.py')
    assert top1(page.run(command)) == stated(command)
    assert top1(page.run(page.command('--results-file results.csv'))) == stated(command)


@pytest.mark.parametrize('program, file', [
    ('avg_checkpoints.py', 'averaged.pth'), ('clean_checkpoint.py', 'clean.safetensors')])
def test_checkpoints_of_a_run(page, trained, program, file):
    trained('whole')
    page.run(page.command(program))
    command = page.command(f'--checkpoint {file}')
    assert top1(page.run(command)) == pytest.approx(stated(command), abs=6)
