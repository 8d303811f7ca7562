"""timm's validate.py: the pretrained weights, checkpoints of every kind, other sizes."""
import csv
import re

import pytest
from pages import stated, top1

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def pretrained(page):
    """What validate.py says of the pretrained weights."""
    return page.run(page.command('--results-file results.csv'))


def test_pretrained_and_results_file(page, pretrained):
    assert top1(pretrained) == pytest.approx(stated(page.command('--results-file results.csv')), abs=1)
    with open(page.folder / 'results.csv', newline='') as f:
        row, = csv.DictReader(f)
    assert (row['param_count'], row['img_size'], row['crop_pct']) == ('0.34', '56', '1.0')


def test_reparam(page, pretrained):
    assert top1(page.run(page.command('--reparam'))) == top1(pretrained)


def test_another_size(page):
    made = page.command('--pretrained --img-size 72 --model-kwargs img_size=72')
    accuracy = top1(page.run(made))
    assert accuracy == pytest.approx(stated(made), abs=3)
    assert top1(page.run(made.replace('kwargs img_size=72', 'kwargs dynamic_img_size=True'))) == accuracy
    dynamic = page.command('--model-kwargs dynamic_img_size=True')
    assert top1(page.run(dynamic)) == pytest.approx(stated(dynamic), abs=3)
    out = page.run('validate --data-dir digits --pretrained --img-size 288', fails=True)
    assert re.search('ValueError: The model was made for images of 56 x 56 pixels, got 288 x 288.* img_size=', out)


def test_ema_of_a_training_run(page, trained):
    out, _ = trained('ema')
    plain, ema = (c for c in page.commands() if '--checkpoint out/ema/last.pth.tar' in c)
    for command, name in ((plain, 'Test'), (ema, r'Test \(EMA\)')):
        logged = re.findall(rf'{name}: .*Acc@1: .*\( *(\S+)\)  Acc@5', out)[-1]
        assert top1(page.run(command)) == float(logged) == pytest.approx(stated(command), abs=6)


def test_official_checkpoint(page, pretrained):
    command, finetuned = page.command('--checkpoint official.pth.tar --use-ema'), page.command('finetuned.pth')
    assert top1(page.run(command)) == top1(pretrained) == pytest.approx(stated(command), abs=1)
    assert top1(page.run(command.replace(' --use-ema', ''))) == 10  # the plain weights, zeros here, see one class
    assert top1(page.run(finetuned)) == top1(pretrained) == pytest.approx(stated(finetuned), abs=1)
