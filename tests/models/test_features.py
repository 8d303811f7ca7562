"""features_only=True: the pyramid of strides 4, 8 and 16, and timm's own views of the blocks."""
import re

import pytest
import timm
import torch

TOKEN_TYPES = ('performer', 'transformer', 'convolution')


@pytest.fixture
def images():
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))


def make(**kwargs):
    """A model in evaluation mode, with the same weights whatever view of it is asked for."""
    torch.manual_seed(0)
    return timm.create_model('test_t2t_vit', **kwargs).eval()


def levels_of(model, x):
    """The three levels of a whole model, seen through hooks and forward_intermediates."""
    names = ('attention1', 'attention2') if hasattr(model.patch_embed, 'attention1') else ('soft_split0', 'soft_split1')
    steps = [model.patch_embed.get_submodule(name) for name in names]
    seen = []
    hooks = [step.register_forward_hook(lambda m, args, out: seen.append(out)) for step in steps]
    last = model.forward_intermediates(x, [-1], intermediates_only=True)
    for hook in hooks:
        hook.remove()
    return seen + last


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


@torch.no_grad()
@pytest.mark.parametrize('out_indices, levels', [
    (1, [2]), (2, [1, 2]), (3, [0, 1, 2]), ([0], [0]), ((1,), [1]), ([-1], [2]), ([-3, -2], [0, 1]), ([0, 2], [0, 2]),
    ([2, 0], [2, 0]),
])
def test_out_indices(out_indices, levels, images):
    pyramid = make(features_only=True, out_indices=out_indices)
    assert pyramid.feature_info.reduction() == [(4, 8, 16)[i] for i in levels]
    assert list(pyramid.feature_info.out_indices) == levels
    expected = levels_of(make(), images)
    torch.testing.assert_close(pyramid(images), [expected[i] for i in levels])


@pytest.mark.parametrize('out_indices', [0, 4, -1, [4], [-4], [], [0, 1, 2, 3, 4]])
def test_levels_that_are_not_there(out_indices):
    match = f"levels 0, 1, 2 and 3 .*, not {re.escape(str(out_indices))}.* feature_cls='getter'"
    with pytest.raises(ValueError, match=match):
        timm.create_model('test_t2t_vit', features_only=True, out_indices=out_indices)


@torch.no_grad()
def test_level_of_stride_32_is_pooled(images):
    pyramid = make(features_only=True, out_indices=(0, 1, 2, 3))
    assert pyramid.feature_info.reduction() == [4, 8, 16, 32] and pyramid.feature_info.channels() == [64] * 4
    *_, last, pooled = pyramid(images)
    torch.testing.assert_close(pooled, last.unflatten(2, (2, 2)).unflatten(4, (2, 2)).amax(dim=(3, 5)))
    small = make(features_only=True, out_indices=(3,), img_size=16)
    assert small(torch.randn(1, 3, 16, 16))[0].shape == (1, 64, 1, 1)


@torch.no_grad()
@pytest.mark.parametrize('size, shapes', [
    ((61, 43), [(15, 11), (8, 6), (4, 3)]),
    ((64, 160), [(16, 40), (8, 20), (4, 10)]),
    ((17, 9), [(4, 2), (2, 1), (1, 1)]),
])
@pytest.mark.parametrize('token_type', TOKEN_TYPES)
def test_any_size_and_scripted(token_type, size, shapes):
    x = torch.randn(1, 3, *size)
    for kwargs in (dict(img_size=size), dict(dynamic_img_size=True)):
        levels = make(features_only=True, token_type=token_type, **kwargs)(x)
        assert [tuple(y.shape[-2:]) for y in levels] == shapes
        torch.testing.assert_close(levels, levels_of(make(token_type=token_type, **kwargs), x))
    scripted = torch.jit.script(make(features_only=True, token_type=token_type, dynamic_img_size=True))
    torch.testing.assert_close(scripted(x), levels)


@pytest.mark.parametrize('kwargs', [dict(), dict(feature_cls='getter')], ids=str)
def test_other_images_are_refused(kwargs):
    pyramid = make(features_only=True, **kwargs)
    with pytest.raises(ValueError, match='dynamic_img_size=True'):
        pyramid(torch.randn(1, 3, 64, 64))
    with pytest.raises(ValueError, match='got torch.uint8'), torch.autocast('cpu', torch.bfloat16):
        pyramid(torch.ones(1, 3, 56, 56, dtype=torch.uint8))


@pytest.mark.parametrize('out_indices', [(0,), (0, 1), (0, 1, 2), (2,)])
def test_every_weight_that_remains_is_needed(out_indices, images):
    pyramid = make(features_only=True, out_indices=out_indices).train()
    sum(y.square().sum() for y in pyramid(images)).backward()
    assert not [n for n, p in pyramid.named_parameters() if p.grad is None]
    buffers = ['model.pos_embed'] * (2 in out_indices) + ['model.patch_embed.attention1.w']
    assert [n for n, _ in pyramid.named_buffers() if 'attention2' not in n] == buffers


@torch.no_grad()
@pytest.mark.parametrize('feature_cls', ['getter', 'hook', 'fx'])
@pytest.mark.parametrize('token_type', TOKEN_TYPES)
def test_timms_views_of_the_blocks(request, feature_cls, token_type, images):
    if feature_cls == 'fx':
        request.getfixturevalue('fx_traces_attention')
    net = make(features_only=True, feature_cls=feature_cls, out_indices=(1, 3), token_type=token_type)
    assert net.feature_info.channels() == [64, 64] and net.feature_info.reduction() == [16, 16]
    expected = make(token_type=token_type).forward_intermediates(
        images, [1, 3], return_prefix_tokens=True, intermediates_only=True)
    for got, (grid, class_token) in zip(net(images), expected, strict=True):
        tokens = torch.cat([class_token, grid.flatten(2).transpose(1, 2)], dim=1)
        torch.testing.assert_close(got, grid if feature_cls == 'getter' else tokens)


@pytest.mark.parametrize('decoder, kwargs', [
    ('Unet', dict(encoder_depth=4, decoder_channels=(64, 32, 16, 8))), ('UPerNet', dict(encoder_depth=4)),
    ('Linknet', dict(encoder_depth=4)), ('Segformer', dict(encoder_depth=4)), ('FPN', dict()), ('UPerNet', dict()),
    ('Unet', dict()),
], ids=str)
def test_decoders_of_segmentation_models_train_the_encoder(decoder, kwargs):
    smp = pytest.importorskip('segmentation_models_pytorch', reason='pip install segmentation-models-pytorch')
    model = getattr(smp, decoder)(
        'tu-test_t2t_vit', encoder_weights=None, classes=2, dynamic_img_size=True, token_drop_rate=0., **kwargs)
    assert model.encoder.out_channels == [3, 0, 64, 64, 64, 64][:kwargs.get('encoder_depth', 5) + 1]
    out = model(torch.randn(2, 3, 64, 96))
    assert out.shape == (2, 2, 64, 96)
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.encoder.parameters())
