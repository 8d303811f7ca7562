"""features_only=True: the pyramid of strides 4, 8 and 16, and timm's own views of the blocks."""
import re

import pytest
import timm
import torch

from t2t_timm.models._features import T2TFeaturePyramid

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


@pytest.mark.parametrize('token_type', TOKEN_TYPES)
def test_levels_are_those_of_the_whole_model(token_type):
    model, pyramid = twins(token_type=token_type)
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected, got = reference_levels(model, x), pyramid(x)
    assert len(got) == len(expected) == 3
    for level, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(level, reference)


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


def test_only_nchw():
    with pytest.raises(ValueError, match='NCHW maps only'):
        T2TFeaturePyramid(timm.create_model('test_t2t_vit'), output_fmt='NLC')


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


def test_another_size_is_refused_with_the_way_out():
    pyramid = timm.create_model('test_t2t_vit', features_only=True)
    with pytest.raises(ValueError, match='dynamic_img_size=True'):
        pyramid(torch.randn(1, 3, 64, 64))


@pytest.mark.parametrize('out_indices, gone, kept', [
    ((0,), ('attention2.', 'project.', 'blocks.', 'cls_token', 'pos_embed'), ('patch_embed.attention1.kqv',)),
    ((1,), ('project.', 'blocks.', 'cls_token', 'pos_embed'), ('patch_embed.attention2.kqv',)),
    ((0, 1, 2), (), ('patch_embed.project', 'blocks.3.mlp.fc2', 'cls_token', 'pos_embed')),
])
def test_pruned(out_indices, gone, kept):
    names = list(timm.create_model('test_t2t_vit', features_only=True, out_indices=out_indices).state_dict())
    # the final norm and the classifier stand behind the last level
    for part in (*gone, 'model.norm', 'model.head'):
        assert not [n for n in names if part in n.replace('mlp.', '')], part
    for part in kept:
        assert [n for n in names if n.startswith(f'model.{part}')], part


@pytest.mark.parametrize('out_indices', [(0,), (0, 1), (0, 1, 2), (2,)])
def test_every_parameter_that_remains_is_needed(out_indices):
    pyramid = timm.create_model('test_t2t_vit', features_only=True, out_indices=out_indices)
    sum(y.square().sum() for y in pyramid(torch.randn(2, 3, 56, 56))).backward()
    assert not [n for n, p in pyramid.named_parameters() if p.grad is None]


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


class TestSegmentation:
    """segmentation_models_pytorch builds its decoders on the pyramid."""

    @pytest.fixture
    def smp(self):
        return pytest.importorskip('segmentation_models_pytorch', reason='pip install segmentation-models-pytorch')

    def step(self, model, size=(64, 96)):
        """Run a training step on images of a size and return how the loss changed."""
        x, target = torch.randn(2, 3, *size), torch.randint(0, 2, (2, *size))
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        losses = []
        for _ in range(2):
            out = model(x)
            assert out.shape == (2, 2, *size)
            loss = torch.nn.functional.cross_entropy(out, target)
            optimizer.zero_grad()
            loss.backward()
            assert all(p.grad is not None for p in model.encoder.parameters())
            optimizer.step()
            losses.append(loss.item())
        return losses

    @pytest.mark.parametrize('decoder, kwargs', [
        ('Unet', dict(decoder_channels=(64, 32, 16, 8))),
        ('UPerNet', dict()),
        ('Linknet', dict()),
        ('Segformer', dict()),
    ])
    def test_decoder_trains_a_step(self, smp, decoder, kwargs):
        model = getattr(smp, decoder)(
            'tu-test_t2t_vit', encoder_depth=4, encoder_weights=None, classes=2, dynamic_img_size=True,
            token_drop_rate=0., **kwargs)
        first, second = self.step(model)
        assert second < first

    @pytest.mark.parametrize('decoder', ['FPN', 'UPerNet', 'Unet'])
    def test_decoder_of_four_stages_trains_a_step(self, smp, decoder):
        model = getattr(smp, decoder)(
            'tu-test_t2t_vit', encoder_weights=None, classes=2, img_size=64, token_drop_rate=0.)
        assert model.encoder.out_channels[2:] == [64] * 4
        first, second = self.step(model, (64, 64))
        assert second < first

    @pytest.mark.slow
    def test_unet_on_t2t_vit_14(self, smp):
        model = smp.Unet(
            'tu-t2t_vit_14', encoder_depth=4, decoder_channels=(64, 32, 16, 8), encoder_weights=None, classes=2,
            img_size=64)
        assert model.encoder.out_channels == [3, 0, 64, 64, 384]
        first, second = self.step(model, (64, 64))
        assert second < first
