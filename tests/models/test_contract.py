"""timm's model contract, where timm's own tests (make timm-suite) do not look."""
import copy
import pickle
import threading

import pytest
import timm
import torch
import torch.nn as nn
from timm.layers import set_fused_attn
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import unfreeze

from t2t_timm import set_fused
from t2t_timm.layers import GhostAttention, SqueezeExciteAttention

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
    names = timm.list_models(['t2t_vit*', 'test_t2t_vit'])
    assert len(names) == len(set(names)) == 17
    assert all(getattr(timm.models, name) is timm.models.model_entrypoint(name) for name in names)
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
    assert timm.get_pretrained_cfg('t2t_vit_14_384').input_size == (3, 384, 384)
    cifar = timm.get_pretrained_cfg('t2t_vit_19.in1k_ft_cifar100')
    assert (cifar.num_classes, cifar.mean, cifar.crop_mode) == (100, (0.4914, 0.4822, 0.4465), 'squash')


@pytest.mark.parametrize('pool, shape', [('token', (2, 5)), ('avg', (2, 5)), ('max', (2, 5)), ('', (2, 10, 5))])
def test_global_pool(pool, shape, images):
    model = timm.create_model('test_t2t_vit', num_classes=5, img_size=48, global_pool=pool).eval()
    assert model(images).shape == shape
    tokens = model.forward_features(images)
    assert tokens.shape == (2, 10, 64)
    expected = {'token': tokens[:, 0], 'avg': tokens[:, 1:].mean(1), 'max': tokens[:, 1:].amax(1), '': tokens}[pool]
    torch.testing.assert_close(model.forward_head(tokens, pre_logits=True), expected)
    torch.testing.assert_close(model(images), model.head(expected))


def test_headless(images):
    model = timm.create_model('test_t2t_vit', num_classes=0, img_size=48).eval()
    assert model(images).shape == (2, model.num_features) == (2, model.head_hidden_size)
    assert isinstance(model.get_classifier(), nn.Identity)
    model.reset_classifier(3, 'avg')
    assert model(images).shape == (2, 3) and model.global_pool == 'avg' and model.num_classes == 3


@pytest.mark.parametrize('img_size', [(3, 3), (45, 70), (30, 31), (224, 32)])
def test_any_size_made_dynamic_or_set(img_size):
    x = torch.randn(1, 3, *img_size)
    made = timm.create_model('test_t2t_vit', img_size=img_size).eval()
    assert made.pos_embed.shape[1] == 1 + made.patch_embed.num_patches
    assert made(x).isfinite().all()

    dynamic = timm.create_model('test_t2t_vit', dynamic_img_size=True).eval()
    resized = timm.create_model('test_t2t_vit').eval()
    resized.load_state_dict(dynamic.state_dict())
    resized.set_input_size(img_size)
    torch.testing.assert_close(dynamic(x), resized(x))
    # the table is resampled bicubically, the class token's row untouched
    table = dynamic.pos_embed[:, 1:].reshape(1, *dynamic.patch_embed.grid_size, -1).permute(0, 3, 1, 2)
    table = nn.functional.interpolate(table, resized.patch_embed.grid_size, mode='bicubic', antialias=True)
    torch.testing.assert_close(resized.pos_embed[:, 1:], table.flatten(2).transpose(1, 2))
    torch.testing.assert_close(resized.pos_embed[:, 0], dynamic.pos_embed[:, 0])
    assert 'pos_embed' in dict(resized.named_buffers())
    made.load_state_dict(dynamic.state_dict())  # any route resamples
    torch.testing.assert_close(made(x), resized(x))


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
    for module in (block, block.norm1, block.attn, block.attn.attn_drop, block.mlp, model.norm):
        seen = []
        forward = module.register_forward_hook(lambda m, args, out, seen=seen: seen.append(args[0].shape))
        backward = module.register_full_backward_hook(
            lambda m, grad_in, grad_out, seen=seen: seen.append(grad_out[0].shape))
        out = model(images)
        out.sum().backward()
        forward.remove()
        backward.remove()
        torch.testing.assert_close(out, expected)
        if module is not block.attn.attn_drop:  # unfused attention alone calls it
            assert len(seen) == 2 and all(shape[1] == 10 for shape in seen), type(module)
    original, calls = block.attn.forward, []
    block.attn.forward = lambda x, **kwargs: calls.append(x.shape) or original(x, **kwargs)
    torch.testing.assert_close(model(images), expected)
    assert calls == [(2, 10, block.norm1.normalized_shape[0])]
    del block.attn.forward


@pytest.mark.parametrize('kwargs, alone', [
    (dict(), True), (dict(reg_tokens=2), True), (dict(init_values=1e-2), True), (dict(qkv_bias=True), True),
    (dict(fc_norm=True), True), (dict(pos_embed='learn'), True), (dict(token_type='convolution'), True),
    (dict(qk_norm=True), True), (dict(attn_layer=SqueezeExciteAttention), False),
    (dict(attn_layer=GhostAttention), False), (dict(global_pool='avg'), False), (dict(global_pool='map'), False),
], ids=str)
def test_the_class_tokens_row_alone(kwargs, alone, images, called):
    torch.manual_seed(0)
    model = timm.create_model('test_t2t_vit', img_size=48, depth=2, num_classes=5, **kwargs).eval()
    names = called(model, images)
    assert 'blocks.0.attn' in names and ('blocks.1.attn' not in names) == alone
    torch.testing.assert_close(model(images), model.forward_head(model.forward_features(images)))


def test_dynamically_quantized_linear_layers_are_called(images, called):
    model = timm.create_model('test_t2t_vit', img_size=48).eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    names = {name for name, m in model.named_modules() if type(m) is nn.Linear}
    assert names and not any(type(quantized.get_submodule(name)) is nn.Linear for name in names)
    assert names <= set(called(quantized, images))
    logits, expected = quantized(images), model(images)
    assert not torch.equal(logits, expected)
    assert torch.allclose(logits, expected, atol=0.1)


@pytest.mark.usefixtures('reentrant')
def test_gradient_checkpointing_changes_nothing(model, images):
    def gradients():
        torch.manual_seed(0)  # the same dropout
        model.train().zero_grad()
        model(images).sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    model.set_grad_checkpointing()
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b)


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
def test_layer_decay_groups(model):
    groups = group_parameters(model, model.group_matcher())
    names = [name for name, _ in model.named_parameters()]
    assert sorted(n for g in groups.values() for n in g) == sorted(names)
    assert {'cls_token'} == {n for n in groups[0] if 'patch_embed' not in n}
    assert not [n for i, g in groups.items() if i for n in g if 'patch_embed' in n]
    assert len(groups) == len(model.blocks) + 2  # the stem and the norm with the head
    assert model.no_weight_decay() == {'cls_token', 'reg_token', 'dist_token'}
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


@pytest.mark.parametrize('kind', ['learn', 'none'])
def test_other_position_tables(kind, images):
    model = timm.create_model('test_t2t_vit', num_classes=5, img_size=48, pos_embed=kind)
    assert model(images).shape == (2, 5)
    assert [n for n, _ in model.named_parameters() if n == 'pos_embed'] == ['pos_embed'] * (kind == 'learn')
    assert 'pos_embed' in model.no_weight_decay()


def test_fused_and_unfused_attention(images):
    logits = []
    for fused in (True, False):
        set_fused_attn(fused)
        for token_type in ('performer', 'transformer'):
            torch.manual_seed(0)
            logits.append(timm.create_model('test_t2t_vit', img_size=48, token_type=token_type).eval()(images))
    set_fused_attn(True)
    torch.testing.assert_close(logits[0], logits[2])
    torch.testing.assert_close(logits[1], logits[3])


def test_copies_pickles_and_memory_formats(model, images):
    expected = model(images)
    torch.testing.assert_close(copy.deepcopy(model)(images), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(images), expected)
    channels_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last(images.to(memory_format=torch.channels_last)), expected)


@pytest.fixture
def one_thread_each():
    """Of two threads that run at once, each computes alone: four on two cores would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures('one_thread_each')
def test_two_copies_train_at_the_same_time_as_one_after_the_other(model, images):
    def step(copied, images, gradients):
        copied(images).square().sum().backward()
        gradients[:] = [p.grad for p in copied.parameters()]

    batches = images, images.repeat(4, 1, 1, 1)
    for switch in (True, False):
        in_turn, at_once = ([[], []] for _ in range(2))
        with set_fused(switch):
            for batch, gradients in zip(batches, in_turn, strict=True):
                step(copy.deepcopy(model), batch, gradients)
            threads = [
                threading.Thread(target=step, args=(copy.deepcopy(model), batch, gradients))
                for batch, gradients in zip(batches, at_once, strict=True)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert in_turn[0] and not torch.equal(in_turn[0][0], in_turn[1][0])
        torch.testing.assert_close(at_once, in_turn)


def test_meta_device_then_to_empty():
    model = timm.create_model('test_t2t_vit', device='meta').to_empty(device='cpu')
    model.init_weights()
    fresh = timm.create_model('test_t2t_vit')
    torch.testing.assert_close(model.pos_embed, fresh.pos_embed)
    w = model.patch_embed.attention1.w
    torch.testing.assert_close(w @ w.T, 32 * torch.eye(32), rtol=0, atol=1e-4)
    assert all(p.isfinite().all() for p in model.parameters())
    assert timm.create_model('test_t2t_vit', dtype=torch.bfloat16).pos_embed.dtype == torch.bfloat16


def test_state_dict_is_the_same_at_any_point(model, images):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for training in (True, False):
        model.train(training)(images)
        after = model.state_dict()
        assert list(after) == list(before) and all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.slow
@pytest.mark.parametrize('token_type', ['performer', 'transformer'])
def test_compiles_in_one_graph(token_type, images):
    model = timm.create_model('test_t2t_vit', img_size=48, depth=1, token_type=token_type, token_drop_rate=0.)
    # without AOTAutograd, which test_the_batch_stays_free_in_core_operations runs on the graph of evaluation
    compiled = torch.compile(model.eval(), fullgraph=True, backend='eager')
    torch._dynamo.mark_dynamic(images, 0)  # fails if a graph takes the batch size for a constant
    with torch.no_grad():
        for x in (images, images[:1].repeat(3, 1, 1, 1), images[:1]):  # of one image torch always makes another graph
            torch.testing.assert_close(compiled(x), model(x))
    model.train().zero_grad()
    torch.compile(model, fullgraph=True, backend='aot_eager')(images).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(images).sum().backward()
    for a, b in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('token_type', ['performer', 'transformer'])
def test_trains_on_another_size_with_each_batch(token_type):
    model = timm.create_model(
        'test_t2t_vit', img_size=48, dynamic_img_size=True, token_type=token_type, token_drop_rate=0.)
    gradients = {True: [], False: []}
    for switch, found in gradients.items():
        for shape in ((2, 3, 48, 48), (3, 3, 40, 72), (1, 3, 64, 56)):
            model.zero_grad()
            with set_fused(switch):
                model(torch.randn(shape, generator=torch.Generator().manual_seed(1))).square().sum().backward()
            found.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[True], gradients[False], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('token_type', ['performer', 'transformer'])
def test_compiles_once_for_images_of_any_size(token_type):
    model = timm.create_model(
        'test_t2t_vit', img_size=48, depth=1, dynamic_img_size=True, token_type=token_type, token_drop_rate=0.)
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for shape in ((4, 3, 64, 88), (2, 3, 72, 104), (5, 3, 88, 40), (7, 3, 104, 136)):
        images = torch.randn(shape)
        for dim in (0, 2, 3):
            torch._dynamo.mark_dynamic(images, dim)
        torch.testing.assert_close(compiled(images), model(images.clone()))
    assert len(graphs) == 1


@pytest.mark.parametrize('kwargs, message', [
    (dict(token_type='conv'), "Unknown token_type 'conv': use one of 'performer'"),
    (dict(img_size=2), 'at least 3 x 3 pixels'),
    (dict(patch_size=14), 'patch_size cannot be 14'),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model('test_t2t_vit', **kwargs)


@pytest.mark.timm('1.0.31')
def test_unknown_pooling():
    with pytest.raises(AssertionError, match='Only avg, avgmax, max, token'):
        timm.create_model('test_t2t_vit', global_pool='mean')


@pytest.mark.parametrize('shape, message', [
    ((1, 3, 32, 48), 'made for images of 48 x 48 pixels, got 32 x 48.*img_size=.*dynamic_img_size=True'),
    ((1, 1, 48, 48), r'\(batch, 3, height, width\), got \[1, 1, 48, 48\].*in_chans='),
    ((3, 48, 48), r'\(batch, 3, height, width\), got \[3, 48, 48\]'),
])
def test_bad_images(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model(torch.randn(shape))


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
@pytest.mark.parametrize('token_type', ['performer', 'transformer', 'convolution'])
@pytest.mark.parametrize('dtype', [torch.uint8, torch.int64])
def test_pixels_that_are_whole_numbers(request, mode, token_type, dtype):
    if mode == 'fx':
        request.getfixturevalue('fx_traces_attention')
    model = timm.create_model('test_t2t_vit', img_size=48, depth=1, token_type=token_type).eval()
    got = 'others' if mode == 'scripted' else str(dtype)
    with set_fused(mode != 'equations'):
        model = MODES[mode](model)
        for enabled in (False, True):
            with torch.autocast('cpu', torch.bfloat16, enabled), \
                    pytest.raises((ValueError, torch.jit.Error), match=f'floating-point numbers, got {got}. Divide'):
                model(torch.ones(2, 3, 48, 48, dtype=dtype))


@pytest.mark.parametrize('shape, advice', [
    ((3, 56, 56), 'One image is a batch of 1: x[None].'),
    ((2, 56, 56, 3), 'The channels go before height and width: x.movedim(-1, 1).'),
    ((2, 1, 56, 56), 'Create the model with in_chans= to read another number of channels.'),
])
@pytest.mark.parametrize('mode', ['fused', 'scripted'])
def test_images_of_another_shape(mode, shape, advice):
    model = MODES[mode](timm.create_model('test_t2t_vit', depth=1).eval())
    with pytest.raises((ValueError, torch.jit.Error)) as error:
        model(torch.zeros(shape))
    assert f'(batch, 3, height, width), got {list(shape)}. {advice}' in str(error.value)


@pytest.mark.parametrize('kwargs', [dict(), dict(feature_cls='getter')], ids=str)
def test_pixels_that_are_whole_numbers_in_a_pyramid(kwargs):
    model = timm.create_model('test_t2t_vit', features_only=True, **kwargs)
    with pytest.raises(ValueError, match='got torch.uint8'), torch.autocast('cpu', torch.bfloat16):
        model(torch.ones(1, 3, 56, 56, dtype=torch.uint8))


def test_image_too_small_for_the_soft_splits():
    model = timm.create_model('test_t2t_vit', dynamic_img_size=True)
    with pytest.raises(ValueError, match='at least 3 x 3 pixels, got 2 x 9'):
        model(torch.randn(1, 3, 2, 9))
