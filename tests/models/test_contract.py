"""timm's model contract, where timm's own tests (make timm-suite) do not look."""
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import set_fused_attn
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import unfreeze

from t2t_timm import set_fused
from t2t_timm.layers import GhostAttention, GhostMlp, SqueezeExciteAttention

ARCHITECTURES = {'test_t2t_vit': dict(), 't2t_vit_dense': dict(block_config=(2, 1, 1))}


@pytest.fixture(params=ARCHITECTURES)
def model(request):
    torch.manual_seed(0)
    return timm.create_model(request.param, num_classes=5, img_size=48, **ARCHITECTURES[request.param]).eval()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return torch.randn(2, 3, 48, 48)


def test_every_architecture_is_listed_once_with_its_tags():
    for name in timm.list_models(['t2t_vit*', 'test_t2t_vit']):
        assert getattr(timm.models, name) is timm.models.model_entrypoint(name)
    pretrained = timm.list_pretrained(['t2t_vit*', 'test_t2t*'])
    assert 't2t_vit_24.tl_in1k' in pretrained and 'test_t2t_vit.mnist' in pretrained and len(pretrained) == 19
    assert timm.list_models(module='t2t_vit') and 't2t_vit_dense' in timm.list_models(module='t2t_vit_dense')


def test_pretrained_cfgs():
    cfg = timm.get_pretrained_cfg('t2t_vit_14')
    assert (cfg.tag, cfg.input_size, cfg.crop_pct, cfg.interpolation) == ('in1k', (3, 224, 224), 0.9, 'bicubic')
    # timm itself would ask the Hub for a repo whose weights nobody knows
    assert (cfg.hf_hub_id, cfg.license) == (None, 'bsd-3-clause-clear') and cfg.url.endswith('.pth.tar')
    assert (cfg.mean, cfg.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict()))
    assert transform.transforms[0].size == 248


def test_intermediates_of_every_kind(model, images):
    final, maps = model.forward_intermediates(images)
    torch.testing.assert_close(final, model.forward_features(images))
    assert [tuple(m.shape) for m in maps] == [(2, info['num_chs'], 3, 3) for info in model.feature_info]
    tokens = model.forward_intermediates(images, [1, -1], output_fmt='NLC', intermediates_only=True)
    torch.testing.assert_close(tokens[0].transpose(1, 2).reshape(maps[1].shape), maps[1])
    last, prefix = model.forward_intermediates(
        images, 1, norm=True, output_fmt='NLC', return_prefix_tokens=True, intermediates_only=True)[0]
    torch.testing.assert_close(torch.cat([prefix, last], dim=1), final)
    result = model.forward_intermediates(images, 2, output_dict=True, return_prefix_tokens=True, stop_early=True)
    assert set(result) == {'image_features', 'image_intermediates', 'image_intermediates_prefix'}
    by_dino = model.get_intermediate_layers(images, [1], reshape=True)
    torch.testing.assert_close(by_dino[0], maps[1])


def test_attention_mask(model, images):
    mask = torch.zeros(10, 10)
    torch.testing.assert_close(model(images, attn_mask=mask), model(images))
    assert not torch.allclose(model(images, is_causal=True), model(images))


def test_last_block_computes_every_token_where_somebody_looks(model, images):
    expected = model(images)
    with set_fused(False):
        torch.testing.assert_close(model(images), expected)
    block = model.blocks[-1]
    attn = block.attn
    for module in (block, block.norm1, attn, attn.qkv, attn.q_norm, attn.k_norm, attn.attn_drop, block.mlp, model.norm):
        seen = []
        forward = module.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0].shape))
        backward = module.register_full_backward_hook(
            lambda m, grad_in, grad_out, seen=seen: seen.append(grad_out[0].shape))
        out = model(images)
        out.sum().backward()
        forward.remove()
        backward.remove()
        torch.testing.assert_close(out, expected)
        if module is not attn.attn_drop:  # unfused attention alone calls it
            assert len(seen) == 2 and all(shape[-2] == 10 for shape in seen), type(module)


@pytest.mark.parametrize('kwargs, alone', [
    (dict(), True), (dict(reg_tokens=2), True), (dict(init_values=1e-2), True), (dict(qkv_bias=True), True),
    (dict(fc_norm=True), True), (dict(pos_embed='learn'), True), (dict(token_type='convolution'), True),
    (dict(qk_norm=True), True), (dict(attn_layer=SqueezeExciteAttention), False),
    (dict(attn_layer=GhostAttention), False), (dict(mlp_layer=GhostMlp, mlp_ratio=3.), False),
    (dict(global_pool='avg'), False), (dict(global_pool='map'), False),
], ids=str)
def test_the_class_tokens_row_alone(kwargs, alone, images, called):
    torch.manual_seed(0)
    model = timm.create_model('test_t2t_vit', img_size=48, depth=2, num_classes=5, **kwargs).eval()
    names = called(model, images)
    assert 'blocks.0.attn' in names and ('blocks.1.attn' not in names) == alone


@pytest.mark.usefixtures('reentrant')
@pytest.mark.parametrize('name, kwargs', [
    *ARCHITECTURES.items(), *(('test_t2t_vit', dict(features_only=True, out_indices=i)) for i in ((0, 1), (0, 1, 2)))])
def test_gradient_checkpointing_changes_nothing(name, kwargs, images):
    model, called = timm.create_model(name, img_size=48, **kwargs).train(), []
    stem = model.model.patch_embed if 'features_only' in kwargs else model.patch_embed
    stem.attention1.register_forward_hook(lambda *_: called.append(1))

    def gradients():
        torch.manual_seed(0)  # the same dropout
        model.zero_grad()
        sum(y.sum() for y in model(images)).backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.set_grad_checkpointing()
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b)
    assert len(called) == 1 + 2  # with checkpoints it is called again on the way back


def test_rates_reach_their_layers():
    model = timm.create_model(
        'test_t2t_vit', drop_rate=.1, pos_drop_rate=.2, proj_drop_rate=.3, attn_drop_rate=.4, drop_path_rate=.5)
    block = model.blocks[-1]
    assert (model.head_drop.p, model.pos_drop.p, block.mlp.drop1.p, block.attn.proj_drop.p) == (.1, .2, .3, .3)
    assert (block.attn.attn_drop.p, block.drop_path1.drop_prob) == (.4, .5)
    assert model.patch_embed.attention1.dp.p == 0.1 == model.patch_embed.attention2.mlp[3].p  # as published


def test_drop_path_drops_the_class_token_as_it_drops_all_tokens(images):
    model = timm.create_model('test_t2t_vit', img_size=48, drop_path_rate=.5, token_drop_rate=0.).train()
    torch.manual_seed(0)
    expected = model(images)
    torch.manual_seed(0)
    with set_fused(False):
        torch.testing.assert_close(model(images), expected)


@pytest.mark.timm('1.0.31')
@pytest.mark.parametrize('name', ARCHITECTURES)
def test_layer_decay_groups(name):
    model = timm.create_model(name, reg_tokens=1, pos_embed='learn', **ARCHITECTURES[name])
    groups = group_parameters(model, model.group_matcher())
    names = [name for name, _ in model.named_parameters()]
    assert sorted(n for g in groups.values() for n in g) == sorted(names)
    assert {'cls_token', 'reg_token', 'pos_embed'} == {n for n in groups[0] if 'patch_embed' not in n}
    assert not [n for i, g in groups.items() if i for n in g if 'patch_embed' in n]
    assert len(groups) == len(model.blocks) + 2  # the stem and the norm with the head
    assert model.no_weight_decay() == {'cls_token', 'reg_token', 'dist_token', 'pos_embed'}
    assert torch.jit.script(model).no_weight_decay() == model.no_weight_decay()  # train.py --torchscript asks it


def test_nobody_trains_the_position_table(model, images):
    unfreeze(model)
    model.requires_grad_(True)
    model.pos_embed = nn.Parameter(model.pos_embed.clone())
    model.register_parameter('pos_embed', nn.Parameter(model.pos_embed.clone()))
    optimizer = create_optimizer_v2(model, opt='adamw', lr=0.1, weight_decay=0.1)
    before = {name: v.clone() for name, v in model.state_dict().items()}
    for _ in range(2):
        model.train()(images).square().sum().backward()
        optimizer.step()
    assert {name for name, v in model.state_dict().items() if torch.equal(v, before[name])} == {
        'pos_embed', *(name for name in before if name.endswith('.w'))} == set(dict(model.named_buffers()))


@pytest.mark.parametrize('token_type', ['performer', 'transformer'])
def test_attention_without_timms_fused_one(token_type, images):
    logits = []
    for fused in (True, False):
        set_fused_attn(fused)
        try:
            torch.manual_seed(0)
            logits.append(timm.create_model('test_t2t_vit', img_size=48, token_type=token_type).eval()(images))
        finally:
            set_fused_attn(True)
    torch.testing.assert_close(*logits)


def test_copies_pickles_and_memory_formats(model, images):
    expected = model(images)
    torch.testing.assert_close(copy.deepcopy(model)(images), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(images), expected)
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last(images.to(memory_format=torch.channels_last)), expected)


def test_two_copies_train_at_the_same_time_as_one_after_the_other(model, images):
    def step(batch):
        copied = copy.deepcopy(model)
        copied(batch).square().sum().backward()
        return [p.grad for p in copied.parameters()]

    batches, threads = (images, images.repeat(4, 1, 1, 1)), torch.get_num_threads()
    torch.set_num_threads(1)  # of each: four threads on two cores would wait for each other
    try:
        with ThreadPoolExecutor(2) as pool:
            at_once = list(pool.map(step, batches))
        in_turn = [step(batch) for batch in batches]
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(in_turn[0][0], in_turn[1][0])
    torch.testing.assert_close(at_once, in_turn)


@pytest.mark.slow
@pytest.mark.parametrize('token_type, train', [('performer', True), ('transformer', False)])
def test_compiles_once_for_images_of_any_size(token_type, train):
    model = timm.create_model(
        'test_t2t_vit', img_size=48, depth=1, dynamic_img_size=True, token_type=token_type, token_drop_rate=0.)
    model.train(train).requires_grad_(train)
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for shape in ((4, 3, 64, 88), (2, 3, 72, 104), (5, 3, 88, 40)):
        images = torch.randn(shape)
        for dim in (0, 2, 3):
            torch._dynamo.mark_dynamic(images, dim)  # fails if a graph takes it for a constant
        torch.testing.assert_close(compiled(images), model(images.clone()))
    assert len(graphs) == 1


@pytest.mark.parametrize('kwargs, message', [
    (dict(token_type='conv'), "Unknown token_type 'conv': use one of 'performer'"),
    (dict(img_size=2), 'at least 3 x 3 pixels'),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('test_t2t_vit', **kwargs)


MODES = {
    'equations': lambda model: model,
    'fused': lambda model: model,
    'training': lambda model: model.train(),
    'pure bfloat16': lambda model: model.bfloat16(),
    'compiled': lambda model: torch.compile(model, backend='eager'),
    'fx': torch.fx.symbolic_trace,
    'scripted': torch.jit.script,
}


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('token_type', ['performer', 'convolution'])
def test_pixels_that_are_whole_numbers(request, mode, token_type):
    if mode == 'fx':
        request.getfixturevalue('fx_traces_attention')
    model = timm.create_model('test_t2t_vit', img_size=48, depth=1, token_type=token_type).eval()
    with set_fused(mode != 'equations'):
        model = MODES[mode](model)
        for dtype, enabled in ((torch.uint8, False), (torch.int64, True)):
            got = 'others' if mode == 'scripted' else str(dtype)
            with torch.autocast('cpu', torch.bfloat16, enabled), \
                    pytest.raises((ValueError, torch.jit.Error), match=f'floating-point numbers, got {got}. Divide'):
                model(torch.ones(2, 3, 48, 48, dtype=dtype))


@pytest.mark.parametrize('shape, message', [
    ((3, 48, 48), '(batch, 3, height, width), got [3, 48, 48]. One image is a batch of 1: x[None].'),
    ((2, 48, 48, 3), 'got [2, 48, 48, 3]. The channels go before height and width: x.movedim(-1, 1).'),
    ((2, 1, 48, 48), 'got [2, 1, 48, 48]. Create the model with in_chans= to read another number of channels.'),
    ((1, 3, 32, 48), 'made for images of 48 x 48 pixels, got 32 x 48. Create it with img_size= for another size, with '
                     'dynamic_img_size=True for any'),
])
@pytest.mark.parametrize('mode', ['fused', 'scripted'])
def test_images_of_another_shape(mode, shape, message):
    model = MODES[mode](timm.create_model('test_t2t_vit', img_size=48, depth=1).eval())
    with pytest.raises((ValueError, torch.jit.Error)) as error:
        model(torch.zeros(shape))
    assert message in str(error.value)


def test_image_too_small_for_the_soft_splits():
    model = timm.create_model('test_t2t_vit', dynamic_img_size=True)
    with pytest.raises(ValueError, match='at least 3 x 3 pixels, got 2 x 9'):
        model(torch.randn(1, 3, 2, 9))
