"""What a file says of its run is believed: pooling, heads, preprocessing, sizes, names; or it is refused."""
import copy
import functools
import json
import logging
import math
import re
from argparse import Namespace
from pathlib import Path

import published
import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models._hub import save_for_hf

from t2t_timm.errors import UserError
from t2t_timm.hub.convert import convert
from t2t_timm.hub.verify import verify

pytestmark = pytest.mark.timm('1.0.31')  # convert says so


def own(architecture='test_t2t_vit', **kwargs):
    """Make a model whose weights no other has, in evaluation mode."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=kwargs.pop('num_classes', 10), **kwargs).eval()
    for name, value in model.named_parameters():
        if name != 'pos_embed':
            value.data += 0.05 * torch.randn_like(value)
    return model


@pytest.fixture
def converted(tmp_path):
    """A function that writes a file, converts it, and gives the folder and timm's model of it."""
    def converted(checkpoint, architecture='test_t2t_vit', **kwargs):
        torch.save(checkpoint, tmp_path / 'run.pth.tar')
        out = convert(tmp_path / 'run.pth.tar', architecture, tmp_path / 'out', **kwargs)
        return out, timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    return converted


@pytest.fixture
def refused(tmp_path):
    """A function that writes a file, and sees convert refuse it in these words and leave nothing."""
    def refused(checkpoint, words, architecture='test_t2t_vit', write=torch.save):
        write(checkpoint, tmp_path / 'run.pth.tar')
        before = {path.name for path in tmp_path.iterdir()}
        with pytest.raises(UserError, match=words):
            convert(tmp_path / 'run.pth.tar', architecture, tmp_path / 'out')
        assert {path.name for path in tmp_path.iterdir()} == before
    return refused


def run(net, **args):
    """What timm's train.py saves."""
    args = dict(dict(model='test_t2t_vit', model_kwargs={}, gp=None, mean=None, std=None, crop_pct=None), **args)
    return {'epoch': 1, 'arch': args['model'], 'state_dict': net.state_dict(), 'args': Namespace(**args)}


def assert_same(model, expected, size=None):
    images = torch.randn(2, expected.in_chans, *(size or expected.patch_embed.img_size))
    with torch.inference_mode():
        logits = expected(images)
        assert logits.std() > 0.01
        torch.testing.assert_close(model(images), logits, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- what changes the function

@pytest.mark.parametrize('args, kwargs', [
    *((dict(gp=pool), dict(global_pool=pool)) for pool in ('avg', 'max', 'avgmax')),
    *((dict(model_kwargs=kwargs), kwargs) for kwargs in (
        dict(global_pool='avg'), dict(num_heads=8), dict(act_layer='relu'), dict(norm_layer='rmsnorm'),
        dict(reg_tokens=2), dict(init_values=1e-5), dict(qk_norm=True), dict(qkv_bias=True), dict(global_pool='map'),
        dict(no_embed_class=True), dict(pos_embed='learn'), dict(pos_embed='none'), dict(token_type='transformer'),
        dict(class_token=False, global_pool='avg', fc_norm=True), dict(dynamic_img_size=True, drop_path_rate=0.1),
    )),
], ids=str)
@pytest.mark.parametrize('kind', ['timm', 'Lightning', 'beside'])
def test_every_argument_is_kept(converted, tmp_path, kind, args, kwargs):
    expected = own(**kwargs)
    if kind == 'timm':
        checkpoint = run(expected, **args)
    elif kind == 'Lightning':
        checkpoint = {
            'state_dict': {f'model.{k}': v for k, v in expected.state_dict().items()},
            'hyper_parameters': {'lr': 1e-3, 'model_name': 'test_t2t_vit', **kwargs}}
    else:
        checkpoint = expected.state_dict()
        (tmp_path / 'config.json').write_text(json.dumps(dict(architecture='test_t2t_vit', model_args=kwargs)))
    out, model = converted(checkpoint)
    assert_same(model, expected)
    verdict = verify(str(tmp_path / 'run.pth.tar'), str(out))
    assert verdict.good, verdict.lines


@pytest.mark.parametrize('start', ['x' * 5000, 'x\x1b[31m', 'x\0'], ids=['long', 'control characters', 'null'])
def test_a_start_that_no_folder_can_have(converted, caplog, start):
    caplog.set_level(logging.INFO)
    assert_same(converted(run(own(), model=f'local-dir:{start}'))[1], own())
    assert 'which is no longer there' in caplog.text and '\x1b' not in caplog.text and '\0' not in caplog.text


@pytest.mark.parametrize('folder', ['timm', 'transformers'])
def test_folders_of_timm_and_transformers(converted, tmp_path, folder):
    expected = own(global_pool='avg', img_size=64, num_heads=8)
    data = dict(mean=[0.2, 0.3, 0.4], std=[0.3, 0.3, 0.2], crop_pct=0.8, interpolation='bilinear')
    save_for_hf(
        expected, tmp_path / 'timm', safe_serialization=True, data_config=data,
        model_config=dict(label_names=[f'class {i}' for i in range(10)]))
    config = json.loads((tmp_path / 'timm' / 'config.json').read_text())
    del config['model_args']['num_classes']  # Transformers passes it itself
    (tmp_path / 'timm' / 'config.json').write_text(json.dumps(config))
    if folder == 'transformers':
        transformers = pytest.importorskip('transformers', reason='pip install transformers')
        model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'timm')
        model.save_pretrained(tmp_path / folder)
    out = convert(tmp_path / folder / 'model.safetensors', 'test_t2t_vit', tmp_path / 'out')
    model = timm.create_model(f'local-dir:{out}', pretrained=True).eval()
    assert_same(model, expected)
    cfg = resolve_model_data_config(model)
    assert {k: cfg[k] for k in data} == data and cfg['input_size'] == (3, 64, 64)
    assert model.pretrained_cfg['label_names'] == [f'class {i}' for i in range(10)]
    verdict = verify(str(tmp_path / folder / 'model.safetensors'), str(out))
    assert verdict.good, verdict.lines


def test_verify_builds_each_side_from_its_own_record(tmp_path):
    expected, file = own(global_pool='avg'), tmp_path / 'run.pth.tar'
    torch.save(run(expected, gp='avg', mean=[0.5, 0.5, 0.5]), file)
    out = convert(file, 'test_t2t_vit', tmp_path / 'out')
    assert verify(str(file), str(out)).good
    config = json.loads((out / 'config.json').read_text())
    for change, words in (
            (lambda c: c['pretrained_cfg'].update(mean=[0.5, 0.5, 0.4]), 'preprocessing differs: mean'),
            (lambda c: c['model_args'].clear(), r'largest difference of the logits: \S+ \(more than'),
    ):
        changed = json.loads(json.dumps(config))
        changed.pop('global_pool')
        change(changed)
        (out / 'config.json').write_text(json.dumps(changed))
        verdict = verify(str(file), str(out))
        assert not verdict.good and any(re.search(words, line) for line in verdict.lines), verdict.lines


# ---------------------------------------------------------------- preprocessing and sizes

@pytest.mark.parametrize('in_chans, args, expected', [
    (3, dict(mean=[0.5]), dict(mean=(0.5, 0.5, 0.5))),
    (3, dict(crop_pct=1, interpolation='bilinear'), dict(crop_pct=1, interpolation='bilinear')),
    (1, dict(mean=[0.5], std=[0.1], in_chans=1), dict(mean=(0.5,), std=(0.1,))),
    (1, dict(in_chans=1), dict(mean=((0.485 + 0.456 + 0.406) / 3,))),
    (2, dict(mean=[0.1, 0.2], std=[0.3, 0.4], in_chans=2), dict(mean=(0.1, 0.2), std=(0.3, 0.4))),
    (13, dict(mean=[i / 20 for i in range(13)], in_chans=13), dict(mean=tuple(i / 20 for i in range(13)))),
    (3, dict(model='t2t_vit_14.in1k_ft_cifar10'), dict(
        mean=(0.4914, 0.4822, 0.4465), crop_pct=1, crop_mode='squash', interpolation='bilinear')),
], ids=str)
def test_preprocessing(converted, in_chans, args, expected):
    architecture = args.get('model', 'test_t2t_vit').split('.')[0]
    kwargs = dict(depth=1) if architecture != 'test_t2t_vit' else {}
    _, model = converted(run(own(architecture, in_chans=in_chans, **kwargs), model_kwargs=kwargs, **args), architecture)
    cfg = resolve_model_data_config(model)
    for key, value in expected.items():
        assert (cfg[key] if isinstance(cfg[key], (str, float, int)) else tuple(cfg[key])) == pytest.approx(value), key


def test_a_run_that_started_from_a_folder(converted, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save_for_hf(own(global_pool='avg'), tmp_path / 'start', data_config=dict(mean=[0.1, 0.2, 0.3], crop_pct=0.7),
                model_config=dict(label_names=list('abcdefghij')))
    start, expected = f'local-dir:{tmp_path / "start"}', own(global_pool='avg')
    out, model = converted(run(expected, model=start, mean=[0.5, 0.5, 0.5]))
    cfg = resolve_model_data_config(model)
    assert (cfg['mean'], cfg['crop_pct']) == ([0.5, 0.5, 0.5], 0.7)
    assert 'label_names' not in json.loads((out / 'config.json').read_text())  # those of the start, not of the run
    assert_same(model, expected)
    assert re.search(f'from {start}, which the run started from: .*global_pool avg', caplog.text)
    assert 'label_names' not in caplog.text
    for path in sorted((tmp_path / 'start').iterdir()):
        path.unlink()
    convert(tmp_path / 'run.pth.tar', 'test_t2t_vit', tmp_path / 'other')
    assert 'which is no longer there: its preprocessing is not known' in caplog.text


def test_a_run_of_another_size_than_its_start(converted, tmp_path):
    save_for_hf(own(img_size=64), tmp_path / 'start', model_args=dict(img_size=64))
    expected = own(img_size=(32, 128), pos_embed='learn')
    args = dict(input_size=(3, 32, 128), model_kwargs=dict(pos_embed='learn'))
    assert_same(converted(run(expected, model=f'local-dir:{tmp_path / "start"}', **args))[1], expected)


def test_a_run_that_reads_other_sizes(converted):
    expected = own(dynamic_img_size=True)
    out, model = converted(run(expected, img_size=96, model_kwargs=dict(dynamic_img_size=True)))
    assert tuple(resolve_model_data_config(model)['input_size']) == (3, 96, 96)
    assert_same(model, expected, (96, 96))


@pytest.mark.parametrize('architecture, args, size', [
    ('test_t2t_vit', dict(img_size=64), (64, 64)),
    ('test_t2t_vit', dict(input_size=[3, 32, 128]), (32, 128)),
    ('test_t2t_vit', dict(model_kwargs=dict(img_size=[128, 32])), (128, 32)),
    ('t2t_vit_7', dict(input_size=(3, 112, 448)), (112, 448)),
], ids=str)
def test_the_runs_own_size_goes_first(converted, architecture, args, size):
    expected = own(architecture, img_size=size, pos_embed='learn')
    _, model = converted(run(expected, model=architecture, **args), architecture)
    assert model.patch_embed.img_size == size
    assert_same(model, expected)


# ---------------------------------------------------------------- names of the classes

def test_a_runs_class_map_numbers_the_classes(converted, photos, tmp_path):
    labels = photos('1', '2', '10')
    (tmp_path / 'map.txt').write_text('2\n10\n1\n')
    _, model = converted(run(own(num_classes=3), class_map=str(tmp_path / 'map.txt')), labels=labels)
    assert model.pretrained_cfg['label_names'] == ['2', '10', '1']
    (tmp_path / 'map.txt').unlink()
    with pytest.raises(UserError, match=r'numbered its classes by --class-map .*map.txt, which cannot be read'):
        convert(tmp_path / 'run.pth.tar', 'test_t2t_vit', tmp_path / 'other', labels)


@pytest.mark.parametrize('is_timms', [True, False])
def test_the_order_that_was_taken_is_said_if_another_program_may_have_trained(converted, photos, caplog, is_timms):
    caplog.set_level(logging.INFO)
    checkpoint = run(own(num_classes=3))
    _, model = converted(
        checkpoint if is_timms else {'state_dict': checkpoint['state_dict']}, labels=photos('1', '10', '2'))
    assert model.pretrained_cfg['label_names'] == ['1', '2', '10']
    said = 'numbers folders (1, 2, 10 ...): if another program trained the model' in caplog.text
    assert said == (not is_timms)


def test_names_that_timm_numbers_by_chance_are_refused(converted, photos):
    with pytest.raises(UserError, match="classes '0?1' and '0?1' of .* in either order"):
        converted(run(own(num_classes=3)), labels=photos('1', '01', '2'))


# ---------------------------------------------------------------- OpenMMLab

MM_CONFIG = """
default_scope = '{scope}'
data_preprocessor = dict(num_classes=1000, mean=[127.5, 102.0, 51.0], std=[51.0, 63.75, 25.5], to_rgb={rgb})
model = dict(
    type='ImageClassifier',
    backbone=dict(type='T2T_ViT', img_size=224, num_layers=14, layer_cfgs=dict(num_heads=6, feedforward_channels=1152)))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=256, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224), dict(type='PackInputs')]
"""


def mmpretrain(path, scope, rgb=True):
    meta = dict(
        cfg=MM_CONFIG.format(scope=scope, rgb=rgb), dataset_meta={'classes': tuple(f'c{i}' for i in range(1000))})
    published.openmmlab(path, meta=meta)


def with_small_queries(state_dict):
    """Scores 64 times as large as a model was made for would magnify rounding."""
    return {
        k: torch.cat([v[:len(v) // 3] / 64, v[len(v) // 3:]]) if 'attn.qkv' in k else v for k, v in state_dict.items()}


def test_mmpretrains_scale(tmp_path):
    """From 1.0.0rc7 on, scores are multiplied by the root of the head's width (64 here), whatever scale is given."""
    mmpretrain(tmp_path / 'a.pth', 'mmpretrain')
    checkpoint = torch.load(tmp_path / 'a.pth')
    torch.save(dict(checkpoint, state_dict=with_small_queries(checkpoint['state_dict'])), tmp_path / 'a.pth')
    out = convert(tmp_path / 'a.pth', 't2t_vit_t_14', tmp_path / 'out')
    expected = timm.create_model('t2t_vit_t_14')
    expected.load_state_dict(with_small_queries(published.tensors('t2t_vit_t_14')), strict=False)
    usual = copy.deepcopy(expected).eval().double()
    tokens = (expected.patch_embed.attention1.attn, expected.patch_embed.attention2.attn)
    for attn in (*tokens, *(block.attn for block in expected.blocks)):
        attn.fused_attn = False
        attn.scale = math.sqrt(64)
    images = published.images()[:1].double()
    with torch.inference_mode():
        logits = expected.eval().double()(images)
        model = timm.create_model(f'local-dir:{out}', pretrained=True).eval().double()
        torch.testing.assert_close(model(images), logits, rtol=0, atol=1e-5)
        assert (logits - usual(images)).abs().max() > 0.1
    cfg = resolve_model_data_config(model)
    assert cfg['mean'] == pytest.approx([0.5, 0.4, 0.2]) and cfg['std'] == pytest.approx([0.2, 0.25, 0.1])
    assert cfg['crop_pct'] == pytest.approx(224 / 256)
    assert model.pretrained_cfg['label_names'][999] == 'c999'


def test_mmpretrains_scale_of_what_is_no_matrix(tmp_path, refused):
    mmpretrain(tmp_path / 'a.pth', 'mmpretrain')
    checkpoint = torch.load(tmp_path / 'a.pth')
    checkpoint['state_dict']['backbone.encoder.0.attn.qkv.weight'] = torch.zeros(1).expand(2**18, 2**18)
    refused(checkpoint, 'blocks.0.attn.qkv.weight is not a plain matrix', 't2t_vit_t_14')


def test_mmclss_scale_is_the_usual_one(tmp_path):
    mmpretrain(tmp_path / 'a.pth', 'mmcls')
    out = convert(tmp_path / 'a.pth', 't2t_vit_t_14', tmp_path / 'out')
    with torch.inference_mode():
        logits = timm.create_model(f'local-dir:{out}', pretrained=True).eval()(published.images())
    torch.testing.assert_close(
        logits.double(), torch.from_numpy(published.logits('t2t_vit_t_14')), rtol=0, atol=1e-5)


# ---------------------------------------------------------------- what is refused, in one sentence

@pytest.mark.parametrize('args, words', [
    (dict(gp='nonsense'), "global_pool='nonsense'"),
    (dict(model_kwargs=dict(num_heads=7)), 'num_heads=7.* cannot be built'),
    (dict(model_kwargs=dict(act_layer=torch.float16)), 'act_layer=torch.float16, which a config.json cannot hold'),
    (dict(model_kwargs=dict(nonsense=3)), "unexpected keyword argument 'nonsense'"),
    (dict(model_kwargs='nonsense'), 'says what it is in a way that cannot be read: AttributeError'),
    (dict(mean=[0.1, 0.2]), r'preprocessed with .*mean=\[0.1, 0.2\].*, which cannot be done'),
    (dict(mean='abc'), "preprocessed with .*mean='abc'"),
    (dict(std=[float('inf')]), r'std=\[inf\], which a config.json cannot hold'),
    (dict(crop_pct='x'), "crop_pct='x'"),
    (dict(crop_pct=1e-9), 'crop_pct should lie between 0.1 and 4.0'),
    (dict(interpolation='../../x'), "interpolation='../../x'"),
    (dict(input_size='abc'), 'run.pth.tar'),
    (dict(img_size=96), r'\(1, 17, 64\) instead of \(1, 37, 64\), for images of 96 x 96 pixels: give the size'),
    (dict(input_img_mode='L'), "input_img_mode='L'"),
    (dict(model='t2t_vit_14'), 'not (like )?t(est_t)?2t_vit.*: use --model .*test_t2t_vit'),
    (dict(model_kwargs=dict(class_token=False)), 'class_token=False.* cannot be built'),
    (dict(model_kwargs=dict(qk_norm=True)), 'does not fit test_t2t_vit with qk_norm=True: missing'),
    (dict(img_size=56.), r'input_size=\[3, 56.0, 56.0\], .* a side between 8 and 4096'),
    (dict(img_size=10**40), 'a number of 133 bits'),
    (dict(img_size=torch.tensor(56)), r'tensor\(56\)'),
    (dict(img_size=4096, crop_pct=0.1), 'at most 8192 when divided by crop_pct'),
    (dict(crop_mode='nonsense'), 'crop_mode should be center, squash or border'),
    (dict(model_kwargs=dict(depth=10**7)), 'fewer than such a model has blocks'),
    (dict(model_kwargs=dict(img_size=10**6)), 'a side between 8 and 4096'),
    (dict(model_kwargs=dict(features_only=True)), 'features_only=True.*: it makes a T2TFeaturePyramid'),
    (dict(model_kwargs={3: 4}), 'says what it is in a way that cannot be read: TypeError'),
], ids=str)
def test_a_record_that_cannot_be_kept(refused, tmp_path, args, words):
    refused(run(own(), **args), words)
    verdict = verify(str(tmp_path / 'run.pth.tar'))
    assert not verdict.good and re.search(words, verdict.lines[-1])


@pytest.mark.parametrize('key', ['mean', 'CLASSES', 'dataset_meta'])
def test_what_would_be_endless_when_written_out(refused, key):
    value = ['x']
    for _ in range(60):
        value = [value, value]
    metas = dict(CLASSES={'CLASSES': value}, dataset_meta={'dataset_meta': {'classes': value}, 'cfg': value})
    refused(dict(run(own()), meta=metas[key]) if key in metas else run(own(), **{key: value}), r'\[\[<list>, <list>\]')


def test_a_table_that_is_missing_is_not_made_up(refused):
    checkpoint = run(own(), model_kwargs=dict(pos_embed='learn'))
    del checkpoint['state_dict']['pos_embed']
    refused(checkpoint, 'missing pos_embed')


def test_a_sinusoidal_table_that_is_missing_is_the_models(converted):
    expected = own(reg_tokens=2)
    checkpoint = run(expected, model_kwargs=dict(reg_tokens=2))
    del checkpoint['state_dict']['pos_embed']
    assert_same(converted(checkpoint)[1], expected)


def test_a_way_out_of_a_name_that_contradicts_the_weights(refused):
    refused(run(own(), model='t2t_vit_12'), 'with a file of the state dict alone, if t2t_vit_12 is wrong')
    refused(run(own(), model='test_t2t_vit'), 'not t2t_vit_12: use --model test_t2t_vit.', 't2t_vit_12')


def test_a_run_with_options_of_its_own_is_no_published_file(refused):
    checkpoint = run(own(global_pool='avg'), gp='avg')
    refused(checkpoint, "global_pool='avg', so it is not the published test_t2t_vit.mnist", 'test_t2t_vit.mnist')


@pytest.mark.parametrize('config, words', [
    ('{"label_names": 5}', 'name the classes in a list of texts, not 5'),
    ('{"label_names": ["a\\n# b"]}', 'name the classes in a list of texts'),
    ('{"pretrained_cfg": {"mean": [0.1, 0.2, Infinity]}}', 'which a config.json cannot hold'),
    ('{"pretrained_cfg": {"input_size": 7}}', 'input_size=7'),
    ('{"num_classes": 5}', 'has 10 classes, and the config.json beside it says 5'),
    ('{"model_args": 5}', 'should have model_args as names with values, not 5'),
    ('[' * 200000, 'config.json is not readable JSON'),
    ('nonsense', 'config.json is not readable JSON'),
])
def test_configs_of_others(refused, tmp_path, config, words):
    (tmp_path / 'config.json').write_text(config.replace('{', '{"architecture": "test_t2t_vit", ', 1))
    refused(own().state_dict(), words)


@pytest.mark.parametrize('config', [
    '{"model_type": "bert"}', '{"architecture": "resnet18", "pretrained_cfg": {"mean": "abc"}}'])
def test_a_config_of_something_else_is_left_alone(converted, tmp_path, config):
    (tmp_path / 'config.json').write_text(config)
    assert_same(converted(own().state_dict())[1], own())


@pytest.mark.parametrize('config', [
    '{"architecture": "test_t2t_vit", "global_pool": "avg", "pretrained_cfg": {"tag": "mine", "crop_pct": 0.8}}',
    '\ufeff{"architecture": "mine", "global_pool": "avg", "pretrained_cfg": {"crop_pct": 0.8}}'])
def test_a_tag_or_architecture_of_ones_own(converted, tmp_path, config):
    (tmp_path / 'config.json').write_text(config, encoding='utf-8')
    out, model = converted(own(global_pool='avg').state_dict())
    assert_same(model, own(global_pool='avg'))
    assert model.pretrained_cfg['crop_pct'] == 0.8
    verdict = verify(str(tmp_path / 'run.pth.tar'), str(out))
    assert verdict.good, verdict.lines


@pytest.mark.parametrize('text, note', [
    ('model = Foo(3)\ntest_pipeline = [Foo()]', False), ('model = = 3', True), ('x = 1\n' * 20000, True),
], ids=['objects', 'no Python', 'long'])
def test_openmmlabs_config_that_says_nothing(converted, caplog, text, note):
    caplog.set_level(logging.INFO)
    assert_same(converted(dict(state_dict=own().state_dict(), meta=dict(cfg=text)))[1], own())
    assert ('is no readable Python, or longer than 65536 characters: nothing was taken' in caplog.text) == note


@pytest.mark.parametrize('change, write, words', [
    (dict, functools.partial(torch.save, pickle_protocol=4),
     'pickle_protocol above 3, .* save it again where it was made'),
    (lambda state_dict: {k: v.double() + 1e300 for k, v in state_dict.items()}, torch.save, 'not finite in float32'),
    (lambda state_dict: {k: v for k, v in state_dict.items() if k != 'cls_token'}, torch.save,
     'missing cls_token.* a model without a class token needs'),
], ids=['protocol 4', 'too large', 'no class token'])
def test_files_that_are_refused(refused, change, write, words):
    refused(change(own().state_dict()), words, write=write)


@pytest.mark.parametrize('names', ['official', 'PaddleViT'])
def test_safetensors_of_paddle(tmp_path, names):
    expected = own()
    published.save_file(published.paddle(expected.state_dict(), names), tmp_path / 'a.safetensors')
    out = convert(tmp_path / 'a.safetensors', 'test_t2t_vit', Path(tmp_path) / 'out')
    assert_same(timm.create_model(f'local-dir:{out}', pretrained=True).eval(), expected)


def test_a_checkpoint_without_a_class_token_is_told():
    state_dict = own(class_token=False, global_pool='avg', img_size=(40, 72)).state_dict()
    with pytest.raises(ValueError, match='has no class token'):
        own().load_state_dict(state_dict)
