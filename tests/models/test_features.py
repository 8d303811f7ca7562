"""features_only=True: the pyramid of strides 4, 8 and 16, and timm's own views of the blocks."""
import re

import pytest
import timm
import torch

TOKEN_TYPES = ('performer', 'transformer', 'convolution')


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def reference_levels(model, x):
    """The three levels of a whole model, seen through hooks and forward_intermediates."""
    names = ('attention1', 'attention2') if hasattr(model.patch_embed, 'attention1') else ('soft_split0', 'soft_split1')
    steps = [model.patch_embed.get_submodule(name) for name in names]
    seen = []
    hooks = [step.register_forward_hook(lambda m, args, out: seen.append(out)) for step in steps]
    last = model.forward_intermediates(x, [-1], intermediates_only=True)
    for hook in hooks:
        hook.remove()
    return seen + last


def twins(**kwargs):
    """A whole model and a pyramid with the same weights, in evaluation mode."""
    pyramid_kwargs = {k: kwargs.pop(k) for k in ('out_indices',) if k in kwargs}
    model = timm.create_model('test_t2t_vit', **kwargs).eval()
    pyramid = timm.create_model('test_t2t_vit', features_only=True, **pyramid_kwargs, **kwargs).eval()
    pyramid.model.load_state_dict({k: model.state_dict()[k] for k in pyramid.model.state_dict()})
    return model, pyramid


@pytest.mark.parametrize('name, channels', [
    ('test_t2t_vit', 64), ('t2t_vit_7', 256), ('t2t_vit_14', 384), ('t2t_vit_t_14', 384), ('t2t_vit_c_14', 384),
    ('t2t_vit_14_se', 384), ('t2t_vit_dense', 584),
])
def test_default_is_the_pyramid(name, channels):
    with torch.device('meta'):
        model = timm.create_model(name, features_only=True, img_size=56)
    assert model.feature_info.channels() == [64, 64, channels]
    assert model.feature_info.reduction() == [4, 8, 16]
    with torch.no_grad():
        shapes = [tuple(y.shape) for y in model(torch.empty(2, 3, 56, 56, device='meta'))]
    assert shapes == [(2, 64, 14, 14), (2, 64, 7, 7), (2, channels, 4, 4)]


@pytest.mark.parametrize('out_indices, levels', [
    (1, [2]), (2, [1, 2]), (3, [0, 1, 2]), ([0], [0]), ((1,), [1]), ([-1], [2]), ([-3, -2], [0, 1]), ([0, 2], [0, 2]),
    ([2, 0], [2, 0]),
])
def test_out_indices(out_indices, levels):
    model, pyramid = twins(out_indices=out_indices)
    assert pyramid.feature_info.reduction() == [(4, 8, 16)[i] for i in levels]
    assert list(pyramid.feature_info.out_indices) == levels
    x = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        expected, got = reference_levels(model, x), pyramid(x)
    for level, i in zip(got, levels, strict=True):
        torch.testing.assert_close(level, expected[i])
    assert len(got) == len(levels)


@pytest.mark.parametrize('out_indices', [0, 4, -1, [4], [-4], [], [0, 1, 2, 3, 4]])
def test_levels_that_are_not_there(out_indices):
    match = f"levels 0, 1, 2 and 3 .*, not {re.escape(str(out_indices))}.* feature_cls='getter'"
    with pytest.raises(ValueError, match=match):
        timm.create_model('test_t2t_vit', features_only=True, out_indices=out_indices)


def test_level_of_stride_32_is_pooled():
    model, pyramid = twins(out_indices=(0, 1, 2, 3))
    assert pyramid.feature_info.reduction() == [4, 8, 16, 32] and pyramid.feature_info.channels() == [64] * 4
    x = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        last = model.forward_intermediates(x, [-1], intermediates_only=True)[0]
        levels = pyramid(x)
    assert len(levels) == 4
    torch.testing.assert_close(levels[3], last.unflatten(2, (2, 2)).unflatten(4, (2, 2)).amax(dim=(3, 5)))
    small = timm.create_model('test_t2t_vit', features_only=True, out_indices=(3,), img_size=16)
    assert small(torch.randn(1, 3, 16, 16))[0].shape == (1, 64, 1, 1)


@pytest.mark.parametrize('size, shapes', [
    ((61, 43), [(15, 11), (8, 6), (4, 3)]),
    ((64, 160), [(16, 40), (8, 20), (4, 10)]),
    ((17, 9), [(4, 2), (2, 1), (1, 1)]),
])
@pytest.mark.parametrize('token_type', TOKEN_TYPES)
def test_any_size(token_type, size, shapes):
    fixed_model, fixed = twins(token_type=token_type, img_size=size)
    dynamic_model, dynamic = twins(token_type=token_type, dynamic_img_size=True)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        for model, pyramid in ((fixed_model, fixed), (dynamic_model, dynamic)):
            levels = pyramid(x)
            assert [tuple(y.shape[-2:]) for y in levels] == shapes
            for level, reference in zip(levels, reference_levels(model, x), strict=True):
                torch.testing.assert_close(level, reference)


@pytest.mark.parametrize('kwargs', [dict(), dict(feature_cls='getter')], ids=str)
def test_other_images_are_refused(kwargs):
    pyramid = timm.create_model('test_t2t_vit', features_only=True, **kwargs)
    with pytest.raises(ValueError, match='dynamic_img_size=True'):
        pyramid(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match='got torch.uint8'), torch.autocast('cpu', torch.bfloat16):
        pyramid(torch.ones(1, 3, 56, 56, dtype=torch.uint8))


@pytest.mark.parametrize('out_indices', [(0,), (0, 1), (0, 1, 2), (2,)])
def test_every_weight_that_remains_is_needed(out_indices):
    pyramid = timm.create_model('test_t2t_vit', features_only=True, out_indices=out_indices)
    sum(y.square().sum() for y in pyramid(torch.randn(2, 3, 56, 56))).backward()
    assert not [n for n, p in pyramid.named_parameters() if p.grad is None]
    buffers = ['model.pos_embed'] * (2 in out_indices) + ['model.patch_embed.attention1.w']
    assert [n for n, _ in pyramid.named_buffers() if 'attention2' not in n] == buffers


@pytest.mark.usefixtures('reentrant')
@pytest.mark.parametrize('out_indices', [(0, 1), (0, 1, 2)])
def test_grad_checkpointing_changes_no_gradient(out_indices):
    pyramid = timm.create_model('test_t2t_vit', features_only=True, out_indices=out_indices)
    x = torch.randn(2, 3, 56, 56)

    def gradients():
        pyramid.zero_grad()
        torch.manual_seed(1)  # of the dropout
        sum(y.square().mean() for y in pyramid(x)).backward()
        return {n: p.grad.clone() for n, p in pyramid.named_parameters()}

    expected = gradients()
    recomputed = []
    pyramid.model.patch_embed.attention1.register_forward_hook(lambda *_: recomputed.append(1))
    pyramid.set_grad_checkpointing()
    got = gradients()
    assert len(recomputed) == 2  # once forward, once on the way back
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, msg=lambda m, name=name: f'{name}: {m}')


def test_getter_is_the_view_of_the_blocks():
    model = timm.create_model('test_t2t_vit').eval()
    getter = timm.create_model('test_t2t_vit', features_only=True, feature_cls='getter', out_indices=(0, 2)).eval()
    getter.model.load_state_dict({k: model.state_dict()[k] for k in getter.model.state_dict()})
    assert getter.feature_info.channels() == [64, 64] and getter.feature_info.reduction() == [16, 16]
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = model.forward_intermediates(x, [0, 2], intermediates_only=True)
        for got, reference in zip(getter(x), expected, strict=True):
            torch.testing.assert_close(got, reference)
    assert len(timm.create_model('test_t2t_vit', features_only=True, feature_cls='getter')(x)) == 3


@pytest.mark.parametrize('feature_cls', ['hook', 'fx'])
@pytest.mark.parametrize('token_type', TOKEN_TYPES)
def test_hook_and_fx_give_the_tokens_of_the_blocks(request, feature_cls, token_type):
    if feature_cls == 'fx':
        request.getfixturevalue('fx_traces_attention')
    kwargs = dict(token_type=token_type)
    model = timm.create_model('test_t2t_vit', **kwargs).eval()
    net = timm.create_model(
        'test_t2t_vit', features_only=True, feature_cls=feature_cls, out_indices=(1, 3), **kwargs).eval()
    net.load_state_dict({k: model.state_dict()[re.sub(r'^(body|graph_module)\.', '', k)] for k in net.state_dict()})
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        got = net(x)
        expected = model.forward_intermediates(
            x, [1, 3], output_fmt='NLC', return_prefix_tokens=True, intermediates_only=True)
    for tokens, (grid_tokens, class_token) in zip(got, expected, strict=True):
        torch.testing.assert_close(tokens, torch.cat([class_token, grid_tokens], dim=1))


@pytest.mark.parametrize('token_type', TOKEN_TYPES)
def test_scripted_pyramid(token_type):
    pyramid = timm.create_model('test_t2t_vit', features_only=True, token_type=token_type).eval()
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        for got, expected in zip(torch.jit.script(pyramid)(x), pyramid(x), strict=True):
            torch.testing.assert_close(got, expected)


def test_pretrained_pyramid():
    pyramid = timm.create_model('test_t2t_vit', pretrained=True, features_only=True).eval().double()
    model = timm.create_model('test_t2t_vit', pretrained=True).eval().double()
    x = torch.randn(1, 3, 56, 56, dtype=torch.float64)
    with torch.no_grad():
        for level, reference in zip(pyramid(x), reference_levels(model, x), strict=True):
            torch.testing.assert_close(level, reference)


@pytest.mark.parametrize('decoder, kwargs', [
    ('Unet', dict(encoder_depth=4, decoder_channels=(64, 32, 16, 8))), ('UPerNet', dict(encoder_depth=4)),
    ('Linknet', dict(encoder_depth=4)), ('Segformer', dict(encoder_depth=4)), ('FPN', dict()), ('UPerNet', dict()),
    ('Unet', dict()),
], ids=str)
def test_decoders_of_segmentation_models_train_a_step(decoder, kwargs):
    smp = pytest.importorskip('segmentation_models_pytorch', reason='pip install segmentation-models-pytorch')
    model = getattr(smp, decoder)(
        'tu-test_t2t_vit', encoder_weights=None, classes=2, dynamic_img_size=True, token_drop_rate=0., **kwargs)
    assert model.encoder.out_channels == [3, 0, 64, 64, 64, 64][:kwargs.get('encoder_depth', 5) + 1]
    x, target = torch.randn(2, 3, 64, 96), torch.randint(0, 2, (2, 64, 96))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(2):
        out = model(x)
        assert out.shape == (2, 2, 64, 96)
        losses.append(torch.nn.functional.cross_entropy(out, target))
        optimizer.zero_grad()
        losses[-1].backward()
        assert all(p.grad is not None for p in model.encoder.parameters())
        optimizer.step()
    assert losses[1] < losses[0]
