"""timm's other programs: inference, benchmark, ONNX export and validation, checkpoint averaging and cleaning."""
import csv

import pytest
import timm
import torch
from pages import load, stated, top1
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def whole(page):
    """The page's uninterrupted run of four epochs, of which two checkpoints are averaged and one is cleaned."""
    page.run(page.command('--experiment whole'))
    return page.folder / 'out' / 'whole'


def test_inference(page):
    pytest.importorskip('pandas', reason='inference.py needs pandas: pip install pandas')
    page.run(page.command('--results-file predictions.csv'))
    with open(page.folder / 'predictions.csv', newline='') as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 200
    names = timm.get_pretrained_cfg('test_t2t_vit').label_names
    correct = 0
    for row in rows:
        indices = [int(i) for i in row['index'].strip('[]').split()]
        probabilities = [float(p) for p in row['prob'].strip('[]').split()]
        assert len(indices) == 3 and sum(probabilities) <= 1.001
        assert probabilities == sorted(probabilities, reverse=True)
        assert names[indices[0]] in row['label']
        correct += row['filename'].startswith(f'{indices[0]}_')
    assert correct / len(rows) > 0.95


def test_benchmark(page):
    page.run(page.command('benchmark.py'))
    with open(page.folder / 'benchmark.csv', newline='') as f:
        row, = csv.DictReader(f)
    assert (row['model'], row['param_count'], row['infer_batch_size'], row['train_img_size']) == (
        'test_t2t_vit', '0.34', '8', '56')
    assert float(row['infer_samples_per_sec']) > 0 and float(row['train_samples_per_sec']) > 0


def test_onnx(page):
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(name, reason='pip install t2t-timm[onnx]')
    page.run(page.command('onnx_export.py'))
    command = page.command('onnx_validate.py')
    assert top1(page.run(command)) == stated(command)
    assert top1(page.run(page.command('--results-file results.csv'))) == stated(command)


def test_averaged_checkpoints(page, whole):
    page.run(page.command('avg_checkpoints.py'))
    averaged = torch.load(page.folder / 'averaged.pth', weights_only=True)
    parts = [load(path)['state_dict_ema'] for path in sorted(whole.glob('checkpoint-*.pth.tar'))]
    assert len(parts) == 4
    for name, value in averaged.items():
        mean = torch.stack([part[name].double() for part in parts]).mean(dim=0)
        torch.testing.assert_close(value, mean.float(), rtol=0, atol=1e-6)
    command = page.command('--checkpoint averaged.pth')
    assert top1(page.run(command)) == pytest.approx(stated(command), abs=6)


def test_cleaned_checkpoint(page, whole):
    page.run(page.command('clean_checkpoint.py'))
    cleaned, ema = load_file(page.folder / 'clean.safetensors'), load(whole / 'last.pth.tar')['state_dict_ema']
    assert cleaned.keys() == ema.keys() and all(torch.equal(v, ema[k]) for k, v in cleaned.items())
    command = page.command('--checkpoint clean.safetensors')
    assert top1(page.run(command)) == pytest.approx(stated(command), abs=6)
