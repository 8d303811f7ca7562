"""Whoever changes a part of a model sees it take effect, as with timm's ViT: no shortcut skips what was touched."""
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import Attention, LayerNorm, LayerScale, Mlp
from timm.models.vision_transformer import Block, VisionTransformer
from torch.nn.utils.parametrizations import weight_norm

from t2t_timm import T2TViT, ops, set_fused
from t2t_timm.layers import TokenPerformer, TokenTransformer


def make(token_type='performer', img_size=48, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(
        'test_t2t_vit', img_size=img_size, depth=2, num_classes=5, token_type=token_type, **kwargs)
    for parameter in model.parameters():  # away from the initial zeros and ones
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=['performer', 'transformer'])
def token_type(request):
    return request.param


@pytest.fixture
def images():
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def bend(x):
    """Change x in a way that no norm takes back."""
    return x + .5 * x.roll(1, -1)


class MixTokens(nn.Module):
    """Adds the mean over all tokens."""

    def forward(self, x):
        return x + x.mean(dim=1, keepdim=True)


class Doubles(torch.Tensor):
    """A weight that counts twice in linear maps."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, bias = args
            return F.linear(x, 2 * weight.as_subclass(torch.Tensor), bias)
        return super().__torch_function__(func, types, args, kwargs or {})


class Adapter(nn.Module):
    """What LoRA puts in the place of a linear map."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Linear(linear.in_features, 2), nn.Linear(2, linear.out_features)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x))


class Wrapped(nn.Module):
    """What torch.compile, DataParallel and checkpoint_wrapper put in the place of a module: it has no length."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return bend(self.module(x))


class OwnAttention(Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x.flip(1), attn_mask, is_causal)


class OwnBlock(Block):
    def forward(self, x, attn_mask=None, is_causal=False):
        return super().forward(x, attn_mask, is_causal) + x.mean(dim=1, keepdim=True)


class OwnPerformer(TokenPerformer):
    def forward(self, x):
        return bend(super().forward(x))


class OwnTransformer(TokenTransformer):
    def forward(self, x):
        return bend(super().forward(x))


def replace(obj, name, function):
    """Put function(original, *args) in the place of a method of an object or a class."""
    original = getattr(obj, name)

    def replaced(*args, **kwargs):
        return function(original, *args, **kwargs)
    setattr(obj, name, replaced)


def on_instance(name, function):
    return lambda model, patch: replace(model, name, function)


def on_class(cls, name, function):
    def change(model, patch):
        original = getattr(cls, name)
        patch.setattr(cls, name, lambda *args, **kwargs: function(original, *args, **kwargs))
    return change


def in_subclass(name, function):
    def change(model, patch):
        def method(self, *args, **kwargs):
            return function(getattr(super(Own, self), name), *args, **kwargs)
        Own = type('Own', (T2TViT,), {name: method})
        model.__class__ = Own
    return change


def assign(path, make_module):
    def change(model, patch):
        parent, _, name = path.rpartition('.')
        setattr(model.get_submodule(parent), name, make_module(model.get_submodule(path)))
    return change


def assign_in_tokens(name, name_in_transformer, make_module):
    def change(model, patch):
        is_performer = isinstance(model.patch_embed.attention1, TokenPerformer)
        path = f'patch_embed.attention1.{name if is_performer else name_in_transformer}'
        assign(path, make_module)(model, patch)
    return change


def hook(path, kind='register_forward_hook'):
    def change(model, patch):
        if kind == 'register_forward_hook':
            model.get_submodule(path).register_forward_hook(lambda module, args, out: bend(out))
        else:
            model.get_submodule(path).register_forward_pre_hook(lambda module, args: (bend(args[0]),))
    return change


def become(path, classes):
    def change(model, patch):
        module = model.get_submodule(path)
        module.__class__ = classes[type(module)]
    return change


def global_hook(model, patch):
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: 1.5 * out if isinstance(module, nn.GELU) else None)
    model.handle = handle


def own_weight(path):
    def change(model, patch):
        linear = model.get_submodule(path)
        linear._parameters['weight'] = linear.weight.detach().as_subclass(Doubles)
    return change


def own_attribute(path, name):
    def change(model, patch):
        module = model.get_submodule(path)
        tensor = getattr(module, name).detach().as_subclass(Doubles)
        delattr(module, name)
        setattr(module, name, tensor)
    return change


def compile_block(model, patch):
    def backend(graph, example_inputs):
        return lambda *args: [bend(out) for out in graph(*args)]
    model.blocks[1].compile(backend=backend)


TOKENS_TWICE = {
    '_pos_embed': lambda original, x: bend(original(x)),
    'pool': lambda original, x, *args, **kwargs: x.mean(dim=1),
    'forward_head': lambda original, x, **kwargs: original(x + x.mean(dim=1, keepdim=True), **kwargs),
    'forward_features': lambda original, x, **kwargs: original(x, **kwargs).flip(1),
}
CHANGES = {
    **{f'{name} of the instance': on_instance(name, f) for name, f in TOKENS_TWICE.items()},
    **{f'{name} of a subclass': in_subclass(name, f) for name, f in TOKENS_TWICE.items()},
    'VisionTransformer.pool': on_class(VisionTransformer, 'pool', lambda original, self, x, *args: x.mean(dim=1)),
    'Attention.forward': on_class(Attention, 'forward', lambda original, self, x, **kwargs: 0. * x),
    'Block.forward': on_class(Block, 'forward', lambda original, self, x, **kwargs: bend(original(self, x, **kwargs))),
    'Mlp.forward': on_class(Mlp, 'forward', lambda original, self, x: bend(original(self, x))),
    'LayerNorm.forward': on_class(nn.LayerNorm, 'forward', lambda original, self, x: bend(original(self, x))),
    'timm LayerNorm.forward': on_class(LayerNorm, 'forward', lambda original, self, x: bend(original(self, x))),
    'Linear.forward': on_class(nn.Linear, 'forward', lambda original, self, x: bend(original(self, x))),
    'GELU.forward': on_class(nn.GELU, 'forward', lambda original, self, x: F.silu(x)),
    'Identity.forward': on_class(nn.Identity, 'forward', lambda original, self, x: x + .1),
    'Dropout.forward': on_class(nn.Dropout, 'forward', lambda original, self, x: .9 * x),
    'Sequential.forward': on_class(nn.Sequential, 'forward', lambda original, self, x: bend(original(self, x))),
    'Module.__call__': on_class(
        nn.Module, '__call__',
        lambda original, self, *args, **kwargs:
            (1.5 if isinstance(self, nn.GELU) else 1.) * original(self, *args, **kwargs)),
    'attention of a subclass': become('blocks.1.attn', {Attention: OwnAttention}),
    'block of a subclass': become('blocks.1', {Block: OwnBlock}),
    'token layer of a subclass': become(
        'patch_embed.attention1', {TokenPerformer: OwnPerformer, TokenTransformer: OwnTransformer}),
    'a norm that mixes tokens': assign('norm', lambda norm: nn.Sequential(norm, MixTokens())),
    'a block as norm': assign('norm', lambda norm: Block(64, 4)),
    'an MLP that mixes tokens': assign('blocks.1.mlp', lambda mlp: nn.Sequential(mlp, MixTokens())),
    'a scale that mixes tokens': assign('blocks.1.ls1', lambda scale: MixTokens()),
    'layer scale': assign('blocks.1.ls1', lambda scale: LayerScale(64, .5)),
    'norm of queries': assign('blocks.1.attn.q_norm', lambda norm: nn.LayerNorm(16)),
    'norm of keys': assign('blocks.1.attn.k_norm', lambda norm: nn.LayerNorm(16)),
    'other blocks': assign('blocks', lambda blocks: nn.Sequential(*blocks, MixTokens())),
    'wrapped MLP in the tokens': assign('patch_embed.attention1.mlp', Wrapped),
    'wrapped blocks': assign('blocks', Wrapped),
    'no blocks': assign('blocks', lambda blocks: nn.Identity()),
    'compiled block': compile_block,
    'a norm over tokens and channels': assign('norm', lambda norm: nn.LayerNorm((10, 64))),
    'the same of timm': assign('norm', lambda norm: LayerNorm((10, 64))),
    'the same in the tokens': assign(
        'patch_embed.attention1.norm1', lambda norm: nn.LayerNorm((144, 147), elementwise_affine=False)),
    'projection of the tokens without a bias': assign_in_tokens(
        'proj', 'attn.proj', lambda linear: nn.Linear(64, 64, bias=False)),
    'other patch embedding': assign('patch_embed', lambda embed: nn.Sequential(embed, nn.LayerNorm(64))),
    'other token layer': assign('patch_embed.attention1', lambda layer: nn.Sequential(layer, nn.Tanh())),
    'adapter of a map in the tokens': assign_in_tokens('kqv', 'attn.qkv', Adapter),
    'adapter of project': assign('patch_embed.project', Adapter),
    'adapter of the last qkv': assign('blocks.1.attn.qkv', Adapter),
    'weight norm': lambda model, patch: weight_norm(
        model.patch_embed.project).parametrizations.weight.original0.data.mul_(2),
    'weight of a tensor subclass, project': own_weight('patch_embed.project'),
    'weight of a tensor subclass, qkv': own_weight('blocks.1.attn.qkv'),
    'the same as a plain attribute': own_attribute('patch_embed.project', 'weight'),
    'hook of the last attention': hook('blocks.1.attn'),
    'hook of the last projection': hook('blocks.1.attn.proj'),
    'hook of the blocks': hook('blocks'),
    'hook before the norm': hook('norm', 'register_forward_pre_hook'),
    'hook inside the tokens': hook('patch_embed.attention2.norm2'),
    'hook of project': hook('patch_embed.project'),
    'global hook': global_hook,
    'forward of an instance': lambda model, patch: replace(
        model.patch_embed.attention1.norm1, 'forward', lambda original, x: bend(original(x))),
    'maps of the patch embedding': lambda model, patch: replace(
        model.patch_embed, 'maps', lambda original, *args: [bend(m) for m in original(*args)]),
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
def test_every_change_takes_effect(change, token_type, images, monkeypatch):
    model = make(token_type)
    with torch.no_grad():
        before = model(images)
        try:
            change(model, monkeypatch)
            logits = model(images)
            step_by_step = model.forward_head(model.forward_features(images))
            with set_fused(False):
                equations = model(images)
        finally:
            monkeypatch.undo()
            if isinstance(getattr(model, 'handle', None), torch.utils.hooks.RemovableHandle):
                model.handle.remove()
    assert (logits - before).abs().max() > 1e-3 * before.abs().max()
    torch.testing.assert_close(logits, step_by_step)
    torch.testing.assert_close(logits, equations)


MLP_CHANGES = {
    'no activation': lambda mlp: mlp.__setitem__(1, nn.Identity()),
    'another activation': lambda mlp: mlp.__setitem__(1, nn.SiLU()),
    'another GELU': lambda mlp: mlp.__setitem__(1, nn.GELU(approximate='tanh')),
    'one layer more': lambda mlp: mlp.append(nn.Linear(64, 64)),
    'another order': lambda mlp: mlp.__setitem__(slice(0, 2), [nn.GELU(), nn.Linear(64, 64)]),
}


@pytest.mark.parametrize('change', MLP_CHANGES.values(), ids=MLP_CHANGES)
def test_changes_of_the_performers_mlp(change, images):
    model = make(token_drop_rate=0.)
    before = model(images)
    mlp = model.patch_embed.attention1.mlp
    if change is MLP_CHANGES['another order']:
        mlp[0], mlp[1] = mlp[1], mlp[0]
    else:
        change(mlp)
    logits = model(images)
    with set_fused(False):
        torch.testing.assert_close(logits, model(images))
    assert not torch.equal(logits, before)


def test_monte_carlo_dropout_of_the_token_transformer(images):
    model = make('transformer')
    model.patch_embed.attention1.mlp.drop2.train().p = 1.
    logits = model(images)
    with set_fused(False):
        torch.testing.assert_close(logits, model(images))


def test_untouched_models_are_fused(token_type, images):
    model = make(token_type)
    assert model._reads_class_token(images)
    layers = model.patch_embed, model.patch_embed.attention1, model.patch_embed.attention2
    assert all(ops.can_fuse(images, layer) for layer in layers)
    model.register_forward_hook(lambda *args: None)  # the model itself is called in either case
    model.patch_embed.register_forward_hook(lambda *args: None)
    assert model._reads_class_token(images) and ops.can_fuse(images, model.patch_embed)


@pytest.mark.parametrize('fused_attn', [True, False])
@pytest.mark.parametrize('options', [
    dict(), dict(qkv_bias=True, num_heads=4), dict(qk_norm=True, init_values=.5), dict(scale_attn_norm=True),
    dict(attn_drop_rate=1., drop_path_rate=0.),  # drops every share, so that chance decides nothing
], ids=str)
def test_class_tokens_row_is_that_of_all_tokens_with_its_gradients(options, fused_attn, images):
    model = make(dtype=torch.float64, token_drop_rate=0., **options).train('attn_drop_rate' in options)
    model.blocks[-1].attn.fused_attn = fused_attn
    images = images.double()
    assert model._reads_class_token(images)
    logits, expected = model(images), model.forward_head(model.forward_features(images))
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    weights, probe = list(model.parameters()), torch.randn_like(logits)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, weights, probe, allow_unused=True) for y in (logits, expected)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('options', [
    dict(qk_norm=True), dict(scale_attn_norm=True), dict(norm_layer='rmsnorm'), dict(act_layer='silu'),
    dict(attn_layer=OwnAttention), dict(block_fn=OwnBlock), dict(init_values=.5), dict(fc_norm=True),
    dict(global_pool='avg'), dict(global_pool='avg', fc_norm=None), dict(global_pool='prr'), dict(global_pool='map'),
    dict(scale_mlp_norm=True), dict(proj_bias=False), dict(pre_norm=True), dict(final_norm=False),
    dict(pool_include_prefix=True, global_pool='avg'), dict(pos_embed='learn'), dict(pos_embed='none'),
    dict(embed_norm_layer='layernorm'), dict(attn_layer='diff'), dict(weight_init='jax', fix_init=True),
    dict(dynamic_img_size=True, dynamic_img_pad=True),
], ids=str)
def test_options_of_timms_vision_transformer(options, token_type, images):
    model = make(token_type, **options)
    with torch.no_grad():
        logits = model(images)
        torch.testing.assert_close(logits, model.forward_head(model.forward_features(images)))
        with set_fused(False):
            torch.testing.assert_close(logits, model(images))
    assert logits.shape == (2, 5) and logits.isfinite().all()
    assert isinstance(model, VisionTransformer)


def test_what_cannot_be_replaced_says_what_can():
    model = make()
    names = list(model.state_dict())
    with pytest.raises(AttributeError, match='no patch_embed.proj to replace: replace patch_embed.project'):
        model.patch_embed.proj = nn.Linear(2, 2)
    assert list(model.state_dict()) == names and model.patch_embed.proj is model.patch_embed.project
    with pytest.raises(ValueError, match='stride of 16 pixels: patch_size cannot be 8'):
        make(patch_size=8)
    with pytest.raises(ValueError, match='SqueezeExciteAttention has no qk_norm'):
        timm.create_model('t2t_vit_14_se', depth=1, qk_norm=True)
    with pytest.raises(ValueError, match='GhostMlp has no scale_mlp_norm'):
        timm.create_model('t2t_vit_16_ghost', depth=1, scale_mlp_norm=True)
    with pytest.raises(ValueError, match='T2T-ViT-Dense has no depth: block_config'):
        timm.create_model('t2t_vit_dense', depth=3)


def test_random_features_that_are_trained_get_their_gradient(images):
    model = make(dtype=torch.float64, token_drop_rate=0.)
    for layer in (model.patch_embed.attention1, model.patch_embed.attention2):
        layer.w.requires_grad_()
    features = [model.patch_embed.attention1.w, model.patch_embed.attention2.w]
    grads = torch.autograd.grad(model(images.double()).sum(), features)
    with set_fused(False):
        expected = torch.autograd.grad(model(images.double()).sum(), features)
    torch.testing.assert_close(grads, expected, rtol=1e-9, atol=1e-9)
    assert all(grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize('name', ['attn', 'attn.attn_drop', 'attn.proj', 'mlp.fc2'])
def test_hooks_inside_the_token_transformer_see_the_whole_batch(name):
    model = make('transformer', img_size=224)
    layer, seen = model.patch_embed.attention1, []
    layer.attn.fused_attn = False
    layer.get_submodule(name).register_forward_hook(lambda module, args, out: seen.append(len(out)))
    with torch.no_grad():
        model(torch.zeros(8, 3, 224, 224))
    assert seen == [8]


def test_an_empty_batch(token_type, images):
    assert make(token_type)(images[:0]).shape == (0, 5)


def test_images_keep_their_tensor_subclass(token_type, images):
    class Photo(torch.Tensor):
        pass
    assert type(make(token_type)(images.as_subclass(Photo))) is Photo
