"""A run of train.py with options of its own, converted: validate.py finds the accuracy that train.py found."""
import re

import pytest
from pages import top1

pytestmark = [pytest.mark.slow, pytest.mark.timm('1.0.31')]  # convert says so


@pytest.mark.parametrize('size', ['--model-kwargs img_size=64', '--model-kwargs dynamic_img_size=True'])
def test_a_converted_run_is_as_accurate_as_the_run(page, size):
    name = re.sub(r'.* |\W', '', size)
    out = page.run(
        f'finetune --experiment {name} --gp avg --img-size 64 {size} --crop-pct 1 --interpolation bilinear '
        '--mean 0.3 0.4 0.5 --std 0.2 0.3 0.4')
    told = page.run(
        f't2t-timm convert out/{name}/last.pth.tar --model test_t2t_vit --labels parity/train --out {name} 2>&1\n'
        f't2t-timm verify out/{name}/last.pth.tar {name}')
    assert "from the run's arguments: global_pool avg" in told and '(no more than 0.0001)' in told
    validated = page.run(f'validate --data-dir parity/validation --model local-dir:{name} --pretrained')
    assert top1(validated) == pytest.approx(top1(out), abs=1e-3) and top1(out) > 60
