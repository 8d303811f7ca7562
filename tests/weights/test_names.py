"""Weights as training code in public use wraps them: what is told without doubt loads, the rest says how to choose."""
import re

import published
import pytest
import timm
import torch
from published import prefixed, zeros

from t2t_timm.cli import main
from t2t_timm.errors import UserError
from t2t_timm.weights.checkpoint import read_checkpoint
from t2t_timm.weights.names import find_weights

WRAPPED = {  # what training code saves of weights; if it saves two sets, the other one is zeros; what is noted
    "the authors' transfer_learning.py": (
        lambda w: {'net': prefixed('module.', w), 'acc': 98.3, 'epoch': 57}, 'weights under net'),
    'model_state': (lambda w: {'model_state': w, 'optimizer_state': {'state': {}}}, 'weights under model_state'),
    'model_state_dict': (lambda w: {'epoch': 3, 'model_state_dict': w, 'loss': 0.1}, 'weights under model_state_dict'),
    'fastai': (lambda w: {'model': w, 'opt': {'state': [], 'hypers': []}}, 'weights under model'),
    'accelerate, DDP': (lambda w: prefixed('module.', w), 'weights under module'),
    'DeepSpeed': (
        lambda w: {'module': w, 'buffer_names': [], 'param_shapes': [{k: v.shape for k, v in w.items()}]},
        'weights under module'),
    'Composer': (lambda w: {'state': {'model': prefixed('module.', w), 'timestamp': {}}}, 'weights under state.model'),
    'DataParallel around a model of ones own': (lambda w: prefixed('module.model.', w), 'weights under module.model'),
    'blocks compiled one by one': (
        lambda w: {re.sub(r'^(blocks\.\d+)', r'\1._orig_mod', k): v for k, v in w.items()}, ''),
    **{f'Lightning, {name}': (
        lambda w, name=name: {
            'state_dict': {**prefixed(f'{name}.', w), 'loss.weight': torch.ones(10)},
            'pytorch-lightning_version': '2.5.0', 'hyper_parameters': {'lr': 1e-3},
            'callbacks': {'ModelCheckpoint': {'best_model_score': torch.ones(())}}},
        f'weights under state_dict.{name}; loss.weight left out') for name in ('model', 'net', 'backbone')},
    "Lightning's WeightAveraging": (
        lambda w: {
            'state_dict': prefixed('model.', w), 'current_model_state': prefixed('model.', zeros(w)),
            'averaging_state': {'n_averaged': torch.tensor(9)}},
        'weights under state_dict.model, leaving current_model_state.model aside'),
    "torchvision's references": (
        lambda w: {'model': zeros(w), 'model_ema': {'n_averaged': torch.tensor(9), **prefixed('module.', w)}},
        'weights under model_ema, leaving model aside'),
    'ema': (lambda w: {'model': zeros(w), 'ema': {'module': w, 'updates': 9}}, 'under ema, leaving model aside'),
    'BasicSR': (lambda w: {'params': zeros(w), 'params_ema': w}, 'under params_ema, leaving params aside'),
    'ema_pytorch': (
        lambda w: {**prefixed('online_model.', zeros(w)), **prefixed('ema_model.', w), 'step': torch.tensor(9)},
        'under ema_model, leaving online_model aside; step left out'),
    'an average inside the model': (
        lambda w: {'model': {**zeros(w), **prefixed('ema.', w)}}, 'under model.ema, leaving model aside'),
    "mmengine's EMAHook": (
        lambda w: {
            'message_hub': {}, 'state_dict': prefixed('backbone.', w),
            'ema_state_dict': {'steps': torch.tensor(9), **prefixed('module.backbone.', zeros(w))}},
        'under state_dict.backbone, leaving ema_state_dict.backbone aside'),
    "mmcv's EMAHook": (
        lambda w: {'state_dict': {
            **prefixed('backbone.timm_model.', w),
            **{f"ema_backbone_timm_model_{k.replace('.', '_')}": v for k, v in zeros(w).items()}}},
        "weights under state_dict.backbone.timm_model; averaged weights, as mmcv's EMAHook leaves"),
}


def equal(state_dict, weights):
    return state_dict.keys() == weights.keys() and all(torch.equal(v, weights[k]) for k, v in state_dict.items())


@pytest.mark.parametrize('kind', WRAPPED)
def test_wrapped_weights_are_found(kind, tmp_path):
    file, weights, (wrap, words) = str(tmp_path / 'a.pth'), published.tiny(num_classes=10), WRAPPED[kind]
    torch.save(wrap(published.official(weights)), file)
    checkpoint = read_checkpoint(file)
    assert words in '; '.join(checkpoint.notes) and bool(words) == bool(checkpoint.notes)
    assert equal(checkpoint.state_dict, weights)
    if kind not in ('ema', 'an average inside the model'):  # of 'model' and 'ema', timm takes 'model' out first
        model = timm.create_model('test_t2t_vit', pretrained=True, pretrained_cfg_overlay=dict(file=file))
        assert equal(model.state_dict(), weights)
    if kind in ("the authors' transfer_learning.py", 'model_state', 'DeepSpeed', 'Composer', 'BasicSR'):
        # what timm's loader does not know, it hands over
        assert equal(timm.create_model('test_t2t_vit', checkpoint_path=file).state_dict(), weights)


def test_a_checkpoint_of_something_else_is_torchs_to_refuse():
    with pytest.raises(RuntimeError, match='Unexpected key.* "net", "acc"'):
        timm.create_model('test_t2t_vit').load_state_dict({'net': {'conv1.weight': torch.ones(1)}, 'acc': 98.3})


@pytest.mark.parametrize('wrapper, second', [
    ('state_dict_ema', 'model_ema'), ('model_ema', 'ema'), ('net_ema', 'state_dict'), ('state_dict', 'model'),
    ('model', 'teacher')])
def test_the_order_of_preference(wrapper, second):
    weights = {'patch_embed.soft_split0.weight': torch.ones(1)}
    checkpoint = {second: zeros(weights), wrapper: weights, 'optimizer': {}}
    assert find_weights(checkpoint) == (weights, [f'weights under {wrapper}, leaving {second} aside'])


TWO = {  # what is saved of two models, and the key of each
    'DINO': (
        lambda s, t: {
            'student': {**prefixed('module.backbone.', s), 'module.head.mlp.0.weight': torch.ones(2, 2)},
            'teacher': {**prefixed('backbone.', t), 'head.mlp.0.weight': torch.ones(2, 2)}, 'args': {'arch': 't2t'}},
        'student.backbone', 'teacher.backbone'),
    'DINOv2': (
        lambda s, t: {'model': {**prefixed('student.backbone.', s), **prefixed('teacher.backbone.', t)}},
        'model.student.backbone', 'model.teacher.backbone'),
    'a mean teacher': (lambda s, t: {'net': s, 'teacher': t}, 'net', 'teacher'),
    'MoCo': (
        lambda s, t: {'state_dict': {**prefixed('module.encoder_q.', s), **prefixed('module.encoder_k.', t)}},
        'state_dict.encoder_q', 'state_dict.encoder_k'),
}


@pytest.mark.timm('1.0.31')  # convert says so
@pytest.mark.parametrize('kind', TWO)
def test_of_two_models_one_is_to_be_chosen(kind, tmp_path, capsys):
    both = published.tiny(num_classes=0), {k: 1.5 * v for k, v in published.tiny(num_classes=0).items()}
    file, out = tmp_path / 'a.pth', str(tmp_path / 'out')
    wrap, *keys = TWO[kind]
    torch.save(wrap(*map(published.official, both)), file)
    sentence = (
        f'This checkpoint holds 2 T2T-ViTs, under {keys[0]!r}, {keys[1]!r}: choose one, as in '
        f'`t2t-timm convert FILE --key {keys[1]}`. Nothing was loaded.')
    convert = ['convert', str(file), '--model', 'test_t2t_vit', '--out', out]
    assert main(convert) == main(['verify', str(file)]) == 1
    told = capsys.readouterr()
    assert told.err == f't2t-timm convert: {file}: {sentence}\n'
    assert f'loads strictly: no. {file}: {sentence}' in told.out
    if kind not in ('DINOv2', 'MoCo'):  # timm takes model and state_dict out
        with pytest.raises(ValueError, match=f'^{re.escape(sentence)}$'):
            timm.create_model('test_t2t_vit', checkpoint_path=str(file), num_classes=0)
    assert [path.name for path in tmp_path.iterdir()] == ['a.pth']
    for key, expected in zip(keys, both, strict=True):
        assert equal(read_checkpoint(file, key).state_dict, expected)
    assert main([*convert, '--key', keys[1]]) == 0
    assert main(['verify', str(file), out, '--key', keys[1]]) == 0
    assert equal(timm.create_model(f'local-dir:{out}', pretrained=True).state_dict(), both[1])


def test_a_key_says_more_than_the_order(tmp_path):
    weights = published.tiny()
    torch.save({'state_dict': weights, 'state_dict_ema': zeros(weights)}, tmp_path / 'a.pth')
    assert equal(read_checkpoint(tmp_path / 'a.pth', 'state_dict').state_dict, weights)
    with pytest.raises(UserError, match="no T2T-ViT under 'student', but under 'state_dict', 'state_dict_ema'"):
        read_checkpoint(tmp_path / 'a.pth', 'student')


def test_a_head_of_ones_own_is_left_out(tmp_path):
    """Nothing says what it reads."""
    weights = published.tiny(num_classes=0)
    head = {'classifier.weight': torch.ones(3, 64), 'classifier.bias': torch.ones(3)}
    torch.save({**prefixed('backbone.', weights), **head}, tmp_path / 'a.pth')
    checkpoint = read_checkpoint(tmp_path / 'a.pth')
    assert equal(checkpoint.state_dict, weights)
    assert checkpoint.notes == ['weights under backbone', 'classifier.weight, classifier.bias left out']


def test_what_holds_no_t2t_vit_says_what_it_holds(tmp_path):
    torch.save({'epoch': 3, 'net': {'conv1.weight': torch.ones(1), 'fc': torch.ones(1)}}, tmp_path / 'a.pth')
    with pytest.raises(UserError, match=r'holds no T2T-ViT: its names begin with net\.conv1\.weight, net\.fc\.'):
        read_checkpoint(tmp_path / 'a.pth')


@pytest.mark.timeout(20)
def test_long_names_in_many_dicts_are_read_in_time(tmp_path):
    """A short file can hold a long text in many places."""
    key, wrapped = 'x' * 10**6, 'module.' + 'x' * 10**6
    torch.save({str(i): {key: {key: {}}, wrapped: torch.ones(1)} for i in range(2000)}, tmp_path / 'a.pth')
    with pytest.raises(UserError, match='holds no T2T-ViT'):
        read_checkpoint(tmp_path / 'a.pth')
