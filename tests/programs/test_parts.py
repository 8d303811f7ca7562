"""The parts of timm that its train.py and validate.py are made of, where no program is needed to see them work."""
import numpy as np
import pytest
import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2

from t2t_timm.hub.convert import convert


def make(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('test_t2t_vit', num_classes=5, img_size=48, **kwargs)


def batch(size=4):
    torch.manual_seed(1)
    return torch.randn(size, 3, 48, 48), torch.arange(size)


def test_mixup_and_cutmix():
    images, targets = batch()
    model, mixup = make().train(), Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=5)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=2e-3)
    mixed, soft = mixup(images.clone(), targets)
    assert not torch.equal(mixed, images) and soft.max() < 1
    losses = []
    for _ in range(10):
        losses.append(SoftTargetCrossEntropy()(model(mixed), soft))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_mixed_precision():
    images, targets = batch()
    model = make(token_drop_rate=0.).train()
    torch.nn.functional.cross_entropy(model(images), targets).backward()
    whole = torch.cat([p.grad.flatten() for p in model.parameters()])
    for dtype, tolerance in ((torch.float16, 0.01), (torch.bfloat16, 0.08)):
        model.zero_grad()
        with torch.autocast('cpu', dtype=dtype):
            logits = model(images)
            torch.nn.functional.cross_entropy(logits, targets).backward()
        assert logits.dtype == dtype
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert gradient.dtype == torch.float32 and (gradient - whole).norm() < tolerance * whole.norm()


def test_load_checkpoint_takes_the_weights_that_use_ema_names(tmp_path):
    plain = make().state_dict()
    averaged = {k: v + 1 for k, v in plain.items()}
    torch.save({'state_dict': plain, 'state_dict_ema': averaged}, tmp_path / 'a.pth.tar')
    for use_ema, expected in ((True, averaged), (False, plain)):
        model = make()
        load_checkpoint(model, str(tmp_path / 'a.pth.tar'), use_ema)
        assert all(torch.equal(v, expected[k]) for k, v in model.state_dict().items())


def test_what_load_checkpoint_refuses_goes_through_convert(tmp_path):
    state, file, model = make().state_dict(), tmp_path / 'a.pth.tar', make()
    torch.save({'state_dict_ema': {k: v + 1 for k, v in state.items()}, 'metric': np.float64(71.7)}, file)
    with pytest.raises(RuntimeError, match='weights_only=True blocked'):
        load_checkpoint(model, str(file))
    load_checkpoint(model, str(convert(file, 'test_t2t_vit', tmp_path / 'out') / 'model.safetensors'))
    assert all(torch.equal(v, state[k] + 1) for k, v in model.state_dict().items())
