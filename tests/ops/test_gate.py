"""The switch, what it makes a model call, and the questions of the gate."""
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import warm
from torch.nn.utils.parametrizations import weight_norm

from t2t_timm import ops, set_fused
from t2t_timm.layers import Block

X = torch.zeros(1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return timm.create_model('test_t2t_vit', depth=2, token_drop_rate=0.).eval()


@pytest.fixture(params=['performer', 'transformer'])
def any_model(request):
    torch.manual_seed(0)
    return timm.create_model('test_t2t_vit', depth=2, token_type=request.param).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))


def is_on():
    return ops.is_unobserved(X)


def test_set_fused_as_function_and_context_manager():
    assert is_on()
    with set_fused(False):
        assert not is_on()
        with set_fused(True):
            assert is_on()
        assert not is_on()
    assert is_on()
    with pytest.raises(RuntimeError, match='^inside$'), set_fused(False):
        raise RuntimeError('inside')
    assert is_on()
    set_fused(False)
    try:
        assert not is_on()
    finally:
        set_fused()
    assert is_on()


def test_environment_variable():
    code = (
        'import torch, timm, t2t_timm\n'
        'calls, unfold = [], torch.nn.functional.unfold\n'
        'torch.nn.functional.unfold = lambda *a, **k: calls.append(a) or unfold(*a, **k)\n'
        'model = timm.create_model("test_t2t_vit", depth=1).eval()\n'
        'for fused in (None, True, False):\n'
        '    if fused is not None:\n'
        '        t2t_timm.set_fused(fused)\n'
        '    model(torch.zeros(1, 3, 56, 56))\n'
        '    print(len(calls))\n'
    )
    done = warm.run(code, T2T_TIMM_FUSED='0')
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['3', '3', '6']


def test_off_every_module_is_called_and_every_token_computed(any_model, images, called, monkeypatch):
    leaves = {name for name, m in any_model.named_modules() if name and not list(m.children())}
    leaves = {name for name in leaves if 'attn_drop' not in name}  # scaled_dot_product_attention stands for it
    unfolds, unfold = [], F.unfold
    monkeypatch.setattr(F, 'unfold', lambda *args, **kwargs: unfolds.append(args) or unfold(*args, **kwargs))
    rows, forward = [], Block.forward
    monkeypatch.setattr(Block, 'forward', lambda m, x, **kwargs: rows.append(x.shape[1]) or forward(m, x, **kwargs))
    with torch.no_grad():
        with set_fused(False):
            names = called(any_model, images)
            expected = any_model(images)
        assert leaves <= set(names)
        assert len(unfolds) == 6 and rows == [17] * 4
        names = called(any_model, images)  # the same model, at the next call
        torch.testing.assert_close(any_model(images), expected)
    assert len(unfolds) == 6 and rows == [17] * 6
    skipped = ('attention1.norm1', 'attention2.norm1', 'project')
    assert not set(names) & {f'patch_embed.{name}' for name in skipped}
    assert 'blocks.1.attn' not in names and 'blocks.1.attn.proj' in names


def test_off_dropout_is_torchs(model, images, monkeypatch):
    model = timm.create_model('test_t2t_vit', depth=1).train()
    rates, dropout = [], F.dropout
    monkeypatch.setattr(F, 'dropout', lambda x, p, *args: rates.append(p) or dropout(x, p, *args))
    with set_fused(False):
        model(images)
    assert rates.count(0.1) == 4
    rates.clear()
    model(images)
    assert rates.count(0.1) == 0


def test_scripted_runs_the_equations(any_model):
    scripted = torch.jit.script(any_model)
    graph = str(scripted.inlined_graph)
    assert graph.count('aten::im2col') + graph.count('torch.nn.functional.unfold') + graph.count('"unfold"') >= 3
    assert 'aten::conv2d' not in graph


class OwnLinear(nn.Linear):
    """What an adapter puts in the place of a linear map."""


@pytest.mark.parametrize('module', [
    OwnLinear(2, 2), nn.Conv2d(2, 2, 1), nn.Identity(), nn.Sequential(nn.Linear(2, 2)), weight_norm(nn.Linear(2, 2)),
], ids=str)
def test_only_torchs_own_linear_and_norm_are_plain(module):
    assert ops.is_plain(X, nn.Linear(2, 2), nn.LayerNorm(2))
    assert not ops.is_plain(X, nn.Linear(2, 2), module)


class WrapperTensor(torch.Tensor):
    """A tensor that holds others, as quantized weights do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ['inner'], None

    @staticmethod
    def __tensor_unflatten__(tensors, *_):
        return WrapperTensor(tensors['inner'])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return cls(func(args[0].inner))


@pytest.mark.parametrize('compiled', [False, True])
def test_weights_that_wrap_others_are_not_plain(compiled):
    linear = nn.Linear(2, 2)
    linear.weight = nn.Parameter(WrapperTensor(torch.randn(2, 2)), requires_grad=False)

    def ask(x, *modules, **kwargs):
        return x + ops.is_plain(x, *modules, **kwargs)
    if compiled:
        ask = torch.compile(ask, backend='eager', fullgraph=True)
    assert ask(X, nn.Linear(2, 2)) == 1
    assert ask(X, linear) == 0
    assert ask(X, idle=(nn.Sequential(linear),)) == 0


@pytest.mark.parametrize('idle, plain', [
    (nn.GELU(), True), (nn.Dropout(0.1), True), (nn.Identity(), True),
    (nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Sequential(nn.LayerNorm(2), nn.Dropout())), True),
    (nn.GELU(approximate='tanh'), False), (nn.ReLU(), False), (nn.AlphaDropout(), False), (nn.Linear(2, 2), False),
    (nn.Sequential(nn.Linear(2, 2), nn.SiLU()), False), (nn.Sequential(nn.ModuleList([nn.Linear(2, 2)])), False),
    (nn.Sequential(OwnLinear(2, 2)), False),
], ids=str)
def test_what_stands_idle(idle, plain):
    assert ops.is_plain(X, idle=(nn.Identity(), idle)) == plain


@pytest.mark.parametrize('observe', [
    lambda m: m.register_forward_hook(print),
    lambda m: m.register_forward_pre_hook(print),
    lambda m: m.register_full_backward_hook(print),
    lambda m: m.register_full_backward_pre_hook(print),
    lambda m: setattr(m, 'forward', m.forward),
], ids=['forward', 'forward_pre', 'backward', 'backward_pre', 'patched'])
@pytest.mark.parametrize('inside', [False, True])
def test_an_observed_module_is_called(observe, inside):
    linear = nn.Linear(2, 2)
    outer = nn.Sequential(nn.Sequential(linear)) if inside else linear
    assert ops.is_unobserved(X, outer)
    handle = observe(linear)
    assert not ops.is_unobserved(X, nn.Identity(), outer)
    if handle is None:
        del linear.forward
    else:
        handle.remove()
    assert ops.is_unobserved(X, outer)


@pytest.mark.parametrize('register', [
    nn.modules.module.register_module_forward_hook,
    nn.modules.module.register_module_forward_pre_hook,
    nn.modules.module.register_module_full_backward_hook,
    nn.modules.module.register_module_full_backward_pre_hook,
])
def test_global_hooks_observe_every_module(register):
    handle = register(lambda *args: None)
    try:
        assert not ops.is_unobserved(X)
        assert not ops.is_plain(X, nn.Linear(2, 2))
    finally:
        handle.remove()
    assert ops.is_unobserved(X)


def test_fx_observes_every_module():
    class Asks(nn.Module):
        def forward(self, x):
            answers.append((ops.is_unobserved(x), ops.is_plain(x, nn.Linear(2, 2))))
            return x + 1

    answers = []
    torch.fx.symbolic_trace(Asks())(X)
    assert answers == [(False, False)]


def test_who_runs_the_operations():
    """`is_recorded` and `is_compiled`, asked in the middle of each."""
    def ask(x):
        answers.append((ops.is_recorded(), ops.is_compiled()))
        return x + 1.

    class Asks(nn.Module):
        def forward(self, x):
            return (x + 1. if ops.is_recorded() else x + 2.) + (10. if ops.is_compiled() else 20.)

    answers, x = [], torch.zeros(2)
    ask(x)
    assert answers == [(False, False)]
    answers.clear()
    torch.jit.trace(ask, x, check_trace=False)
    torch.func.vmap(ask)(x)
    torch.func.grad(lambda x: ask(x).sum())(x)
    torch.func.jvp(ask, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        ask(x)
    assert len(answers) >= 5 and set(answers) == {(True, True)}
    assert Asks()(x)[0] == 22.
    assert torch.compile(Asks(), backend='eager', fullgraph=True)(x)[0] == 12.
    if hasattr(torch.compiler, 'is_exporting'):  # before torch 2.7 they cannot be told apart
        assert torch.export.export(Asks(), (x,)).module()(x)[0] == 11.
