"""The switch, what it makes a model call, and the questions of the gate."""
import asyncio
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
import warm
from torch.nn.utils.parametrizations import weight_norm

from t2t_timm import ops, set_fused
from t2t_timm.ops import gate

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
    return ops.can_fuse(X, nn.Linear(2, 2))


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


def test_the_context_manager_holds_in_its_thread_alone_and_a_call_in_all():
    def answer():
        return ThreadPoolExecutor(1).submit(is_on).result()

    with set_fused(False):
        assert answer()
        set_fused(False)  # the default, of threads that have no context of their own
        assert not answer()
        set_fused()
    again = set_fused(False)
    assert not answer()
    for _ in range(2):
        with again, again:
            assert answer() and not is_on()
        assert is_on()


def test_overlapping_context_managers_leave_nothing_behind():
    made, inside, left = Barrier(2), Barrier(2), Barrier(2)

    def enter(enable, first):
        manager = set_fused(enable)
        made.wait()  # both have been called before either is entered
        with manager:
            inside.wait()
            seen = is_on()
            if not first:
                left.wait()
        if first:
            left.wait()
        return seen

    with ThreadPoolExecutor(2) as pool:
        for first in (True, False, True):  # whoever begins does not end last
            answers = [pool.submit(enter, False, first), pool.submit(enter, True, not first)]
            assert [a.result() for a in answers] == [False, True]
            assert is_on() and all(pool.map(lambda _: is_on(), range(4)))


async def ask(enable, turn):
    with set_fused(enable):
        await turn.wait()  # the other task is inside too
        return is_on()


def test_tasks_of_one_thread_do_not_see_each_other():
    async def both():
        turn = asyncio.Event()
        tasks = [asyncio.create_task(ask(enable, turn)) for enable in (False, True)]
        await asyncio.sleep(0)
        turn.set()
        return await asyncio.gather(*tasks)
    assert asyncio.run(both()) == [False, True] and is_on()


@pytest.mark.parametrize('value', ['0', 'Off'])
def test_environment_variable(value):
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
    done = warm.run(code, T2T_TIMM_FUSED=value)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['3', '3', '6']


def test_off_every_module_is_called_and_every_token_computed(any_model, images, called, monkeypatch):
    leaves = {name for name, m in any_model.named_modules() if name and not list(m.children())}
    leaves = {name for name in leaves if 'attn_drop' not in name}  # scaled_dot_product_attention stands for it
    unfolds, unfold = [], F.unfold
    monkeypatch.setattr(F, 'unfold', lambda *args, **kwargs: unfolds.append(args) or unfold(*args, **kwargs))
    with torch.no_grad():
        with set_fused(False):
            names = called(any_model, images)
            expected = any_model(images)
        assert leaves <= set(names)
        assert len(unfolds) == 6 and 'blocks.1' in names
        names = called(any_model, images)  # the same model, at the next call
        torch.testing.assert_close(any_model(images), expected)
    assert len(unfolds) == 6 and 'blocks.1' not in names
    skipped = ('attention1.norm1', 'attention2.norm1', 'project')
    assert not set(names) & {f'patch_embed.{name}' for name in skipped}
    assert 'blocks.1.attn' not in names and 'blocks.1.attn.proj' in names


def test_scripted_runs_the_equations(any_model):
    scripted = torch.jit.script(any_model)
    graph = str(scripted.inlined_graph)
    assert graph.count('aten::im2col') + graph.count('torch.nn.functional.unfold') + graph.count('"unfold"') >= 3
    assert 'aten::conv2d' not in graph


class OwnLinear(nn.Linear):
    """What an adapter puts in the place of a linear map."""


@pytest.mark.parametrize('module', [
    OwnLinear(2, 2), nn.Conv2d(2, 2, 1), nn.SiLU(), nn.AlphaDropout(), nn.GELU(approximate='tanh'),
    weight_norm(nn.Linear(2, 2)), nn.LayerNorm(2, bias=False),
], ids=str)
def test_what_is_not_known_is_not_fused(module):
    assert ops.can_fuse(X, nn.Linear(2, 2), nn.LayerNorm(2))
    assert not ops.can_fuse(X, nn.Linear(2, 2), module)
    assert not ops.can_fuse(X, module)


@pytest.fixture
def registered():
    """A class that is registered with children of every kind of expectation; a function makes an instance."""
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.mlp = nn.Sequential(nn.Linear(2, 2), nn.GELU())
            self.rest = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(2), nn.Dropout()))
            self.called = nn.Sequential(nn.Tanh())

        def forward(self):
            pass

        def help(self):
            pass

    ops.register(Layer, methods=('help',), children=dict(
        linear=nn.Linear, mlp=(nn.Sequential, nn.Linear, nn.GELU), rest=ops.POINTWISE,
    ), check=lambda m: ops.is_plain_call(m.called))
    yield Layer
    gate._known.pop(Layer)


@pytest.mark.parametrize('name, module', [
    ('linear', OwnLinear(2, 2)), ('linear', nn.Identity()), ('linear', None), ('mlp', None),
    ('mlp', nn.Sequential(nn.Linear(2, 2))), ('mlp', nn.Sequential(nn.Linear(2, 2), nn.Identity())),
    ('mlp', nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Identity())), ('rest', nn.Tanh()),
    ('rest', nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Tanh()))), ('rest', nn.ModuleList([nn.Linear(2, 2)])),
    ('called', nn.ModuleList([nn.Tanh()])),
], ids=str)
def test_children_must_be_what_is_registered(registered, name, module):
    layer = registered()
    assert ops.can_fuse(X, layer) and ops.can_fuse(X, nn.Identity(), layer)
    layer.called.append(nn.Conv2d(2, 2, 1))
    assert ops.can_fuse(X, layer)
    setattr(layer, name, module)
    assert not ops.can_fuse(X, layer)


def test_methods_must_be_what_they_were(registered, monkeypatch):
    layer = registered()
    layer.forward = print  # the layer that asks is being called
    assert ops.can_fuse(X, layer) and not ops.can_fuse(X, nn.Identity(), layer)
    del layer.forward
    layer.help = print
    assert not ops.can_fuse(X, layer)
    del layer.help
    assert ops.can_fuse(X, layer)
    monkeypatch.setattr(registered, 'help', print)
    assert not ops.can_fuse(X, layer)


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
def test_weights_that_wrap_others_are_not_fused(compiled):
    linear = nn.Linear(2, 2)
    linear.weight = nn.Parameter(WrapperTensor(torch.randn(2, 2)), requires_grad=False)

    def ask(x, *modules):
        return x + ops.can_fuse(x, *modules)
    if compiled:
        ask = torch.compile(ask, backend='eager', fullgraph=True)
    assert ask(X, nn.Linear(2, 2)) == 1
    assert ask(X, linear) == 0
    assert ask(X, nn.Linear(2, 2), linear) == 0


@pytest.mark.parametrize('observe', [
    lambda m: m.register_forward_hook(print),
    lambda m: m.register_forward_pre_hook(print),
    lambda m: m.register_full_backward_hook(print),
    lambda m: m.register_full_backward_pre_hook(print),
    lambda m: setattr(m, 'forward', m.forward),
], ids=['forward', 'forward_pre', 'backward', 'backward_pre', 'patched'])
@pytest.mark.parametrize('inside', [False, True])
def test_an_observed_module_is_called(observe, inside, registered):
    layer = registered()
    linear = layer.rest[0] if inside else nn.Linear(2, 2)
    skipped = layer if inside else linear
    assert ops.can_fuse(X, nn.Identity(), skipped)
    handle = observe(linear)
    assert not ops.can_fuse(X, nn.Identity(), skipped)
    if handle is None:
        del linear.forward
    else:
        handle.remove()
    assert ops.can_fuse(X, nn.Identity(), skipped)


@pytest.mark.parametrize('register', [
    nn.modules.module.register_module_forward_hook,
    nn.modules.module.register_module_forward_pre_hook,
    nn.modules.module.register_module_full_backward_hook,
    nn.modules.module.register_module_full_backward_pre_hook,
])
def test_global_hooks_observe_every_module(register):
    handle = register(lambda *args: None)
    try:
        assert not ops.can_fuse(X, nn.Linear(2, 2))
    finally:
        handle.remove()
    assert ops.can_fuse(X, nn.Linear(2, 2))


def test_fx_observes_every_module():
    class Asks(nn.Module):
        def forward(self, x):
            answers.append(ops.can_fuse(x, nn.Linear(2, 2)))
            return x + 1

    answers = []
    torch.fx.symbolic_trace(Asks())(X)
    assert answers == [False]


@pytest.mark.parametrize('patch', [
    'nn.LayerNorm.forward = lambda norm, x, f=nn.LayerNorm.forward: calls.append(norm) or f(norm, x)',
    'nn.LayerNorm.forward = functools.wraps(nn.LayerNorm.forward)('
    'lambda norm, x, f=nn.LayerNorm.forward: calls.append(norm) or f(norm, x))',
    'nn.Linear.forward = functools.partialmethod(nn.Linear.forward)',
])
def test_a_class_patched_before_the_import_is_not_known(patch):
    code = f"""
import functools, torch.nn as nn
calls = []
{patch}
import timm
from t2t_timm import ops
print(ops.can_fuse(None, nn.LayerNorm(3)), ops.can_fuse(None, nn.Linear(3, 3)))
"""
    done = warm.run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == (['False', 'True'] if 'LayerNorm' in patch else ['True', 'False'])
