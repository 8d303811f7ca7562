"""The parts of timm that its train.py and validate.py are made of, where no program is needed to see them work."""
import numpy as np
import published
import pytest
import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

from t2t_timm.hub.convert import convert


def make(**kwargs):
    torch.manual_seed(0)
    return timm.create_model('test_t2t_vit', num_classes=5, img_size=48, **kwargs)


def batch(size=4):
    torch.manual_seed(1)
    return torch.randn(size, 3, 48, 48), torch.arange(size)


def test_layer_decay_scales():
    model = make()
    optimizer = create_optimizer_v2(model, opt='adamw', lr=1., weight_decay=0.05, layer_decay=0.7)
    scales = {id(p): group['lr_scale'] for group in optimizer.param_groups for p in group['params']}
    decays = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    above = {  # layers between this one and the head, the head included
        'cls_token': 5, 'patch_embed': 5, 'blocks.0': 4, 'blocks.1': 3, 'blocks.2': 2, 'blocks.3': 1, 'norm': 1,
        'head': 0,
    }
    for name, param in model.named_parameters():
        assert scales[id(param)] == 0.7 ** above[next(k for k in above if name.startswith(k))], name
        assert decays[id(param)] == (0 if param.ndim == 1 or name == 'cls_token' else 0.05), name


def test_ema_is_the_average_that_it_should_be():
    model = make()
    ema = ModelEmaV3(model, decay=0.9)
    expected = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(3):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        ema.update(model)
        expected = {k: 0.9 * v + 0.1 * model.state_dict()[k] for k, v in expected.items()}
    torch.testing.assert_close(dict(ema.module.state_dict()), expected)


def test_mixup_and_cutmix():
    torch.manual_seed(0)
    images, targets = batch()
    model, mixup = make().train(), Mixup(0.8, 1.0, label_smoothing=0.1, num_classes=5)
    optimizer = create_optimizer_v2(model, opt='adamw', lr=2e-3)
    mixed, soft = mixup(images.clone(), targets)
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(4))
    assert not torch.equal(mixed, images) and soft.max() < 1
    losses = []
    for _ in range(10):
        loss = SoftTargetCrossEntropy()(model(mixed), soft)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_accumulated_gradients_are_those_of_the_whole_batch():
    images, targets = batch()
    model = make(token_drop_rate=0.).train()
    torch.nn.functional.cross_entropy(model(images), targets).backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for part in (slice(0, 2), slice(2, 4)):
        (torch.nn.functional.cross_entropy(model(images[part]), targets[part]) / 2).backward()
    for p, expected in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, expected, rtol=1e-4, atol=1e-6)


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
    plain, averaged = make().state_dict(), {k: v + 1 for k, v in make().state_dict().items()}
    torch.save({
        'state_dict': {f'module.{k}': v for k, v in plain.items()},
        'state_dict_ema': {f'module.{k}': v for k, v in averaged.items()},
    }, tmp_path / 'a.pth.tar')
    for use_ema, expected in ((True, averaged), (False, plain)):
        model = make()
        load_checkpoint(model, str(tmp_path / 'a.pth.tar'), use_ema)
        torch.testing.assert_close(dict(model.state_dict()), dict(expected), rtol=0, atol=0)


def test_an_official_file_with_an_auxiliary_head_loads(tmp_path):
    state = make().state_dict()
    aux_head = {'aux_head.weight': torch.ones(5, 64)}
    torch.save({'state_dict_ema': {**published.official(state), **aux_head}}, tmp_path / 'aux.pth.tar')
    model = make()
    load_checkpoint(model, str(tmp_path / 'aux.pth.tar'))
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)


def test_what_load_checkpoint_refuses_goes_through_convert(tmp_path):
    state = make().state_dict()
    file = tmp_path / 'a.pth.tar'
    torch.save({'state_dict_ema': state, 'metric': np.float64(71.7)}, file)
    with pytest.raises(RuntimeError, match='weights_only=True blocked'):
        load_checkpoint(make(), str(file))
    model = timm.create_model('test_t2t_vit', num_classes=5, img_size=48)
    load_checkpoint(model, str(convert(file, 'test_t2t_vit', tmp_path / 'out') / 'model.safetensors'))
    torch.testing.assert_close(dict(model.state_dict()), dict(state), rtol=0, atol=0)
