"""The switch, what it makes a model call, and the question of the gate."""
import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torch.nn as nn
import warm
from torch.nn.utils.parametrizations import weight_norm
from torch.testing._internal.two_tensor import TwoTensor

from t2t_timm import ops, set_fused
from t2t_timm.layers import TokenPerformer

X = torch.zeros(1)


def is_on():
    return ops.can_fuse(X, nn.Linear(2, 2))


def test_set_fused_as_context_manager():
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


@pytest.mark.parametrize('first', [False, True])
def test_overlapping_context_managers_see_and_leave_nothing_of_each_other(first):
    """Two tasks of one thread; both managers are made before either is entered, and the first entered ends last."""
    async def ask(manager, entered, left):
        with manager:
            entered.set()
            await left.wait()
            return is_on()

    async def both():
        entered, left = ([asyncio.Event(), asyncio.Event()] for _ in range(2))
        managers = set_fused(first), set_fused(not first)
        tasks = []
        for i in range(2):
            tasks.append(asyncio.create_task(ask(managers[i], entered[i], left[i])))
            await entered[i].wait()
        answers = []
        for i in (1, 0):
            left[i].set()
            answers.insert(0, await tasks[i])
        return answers

    assert asyncio.run(both()) == [first, not first] and is_on()


def test_environment_variable():
    code = (
        'import torch, torch.nn as nn, t2t_timm\n'
        'for fused in (None, True, False):\n'
        '    if fused is not None:\n'
        '        t2t_timm.set_fused(fused)\n'
        '    print(t2t_timm.ops.can_fuse(torch.zeros(1), nn.Linear(2, 2)))\n'
    )
    done = warm.run(code, T2T_TIMM_FUSED='0')
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['False', 'True', 'False']


@torch.no_grad()
@pytest.mark.parametrize('token_type', ['performer', 'transformer'])
def test_off_every_module_is_called_and_every_token_computed(token_type, called):
    torch.manual_seed(0)
    model, images = timm.create_model('test_t2t_vit', depth=2, token_type=token_type).eval(), torch.randn(2, 3, 56, 56)
    leaves = {name for name, m in model.named_modules() if name and not list(m.children())}
    leaves = {name for name in leaves if 'attn_drop' not in name}  # scaled_dot_product_attention stands for it
    with set_fused(False):
        names = called(model, images)
        expected = model(images)
    assert leaves <= set(names) and 'blocks.1' in names
    names = called(model, images)  # the same model, at the next call
    torch.testing.assert_close(model(images), expected)
    skipped = {f'patch_embed.{name}' for name in ('attention1.norm1', 'attention2.norm1', 'project')}
    assert not {*skipped, 'blocks.1', 'blocks.1.attn'} & set(names) and 'blocks.1.attn.proj' in names


class OwnLinear(nn.Linear):
    """What an adapter puts in the place of a linear map."""


UNKNOWN = (
    OwnLinear(2, 2), nn.Conv2d(2, 2, 1), nn.SiLU(), nn.AlphaDropout(), nn.GELU(approximate='tanh'),
    weight_norm(nn.Linear(2, 2)), nn.LayerNorm(2, bias=False))


@pytest.mark.parametrize('module', UNKNOWN, ids=str)
def test_what_is_not_known_is_not_fused(module):
    known = nn.Linear(2, 2), nn.LayerNorm(2), nn.Dropout(), nn.GELU(), nn.Identity(), nn.Sequential(nn.Linear(2, 2))
    assert ops.can_fuse(X, *known)
    assert not ops.can_fuse(X, module) and not ops.can_fuse(X, *known, module)


@pytest.mark.parametrize('compiled', [False, True])
def test_weights_that_wrap_others_are_not_fused(compiled):
    linear = nn.Linear(2, 2)
    wrapped = TwoTensor(torch.randn(2, 2), torch.randn(2, 2))  # as quantized weights do
    linear.weight = nn.Parameter(wrapped, requires_grad=False)

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
def test_an_observed_module_is_called(observe):
    layer = TokenPerformer(3)
    linear = layer.kqv
    handle = observe(linear)
    assert ops.can_fuse(X, linear)  # the layer that asks is being called
    assert not ops.can_fuse(X, nn.Identity(), linear) and not ops.can_fuse(X, layer)
    if handle is None:
        del linear.forward
    else:
        handle.remove()
    assert ops.can_fuse(X, nn.Identity(), linear) and ops.can_fuse(X, layer)


@pytest.mark.parametrize('register', [
    nn.modules.module.register_module_forward_hook,
    nn.modules.module.register_module_forward_pre_hook,
    nn.modules.module.register_module_full_backward_hook,
    nn.modules.module.register_module_full_backward_pre_hook,
])
def test_global_hooks_observe_every_module(register):
    handle = register(lambda *args: None)
    try:
        assert not is_on()
    finally:
        handle.remove()
    assert is_on()


def test_few_images_on_an_accelerator_run_the_equations():
    """Launches take the time there; the meta device stands for one, since it has no CPU's caches either."""
    one, many = (torch.empty(batch, 3, 224, 224, device='meta') for batch in (1, 8))
    assert not ops.can_fuse(one, TokenPerformer(3)) and ops.can_fuse(many, TokenPerformer(3))


def test_a_graph_made_on_an_accelerator_takes_every_batch():
    model = timm.create_model('test_t2t_vit', device='meta').eval()
    images, batch = torch.empty(2, 3, *model.patch_embed.img_size, device='meta'), torch.export.Dim('batch', max=4096)
    program = torch.export.export(model, (images,), dynamic_shapes={'x': {0: batch}}, strict=False)
    limits, = program.range_constraints.values()
    assert limits.lower <= 2 and limits.upper == 4096


def test_fx_observes_every_module():
    class Asks(nn.Module):
        def forward(self, x):
            answers.append(ops.can_fuse(x, nn.Linear(2, 2)))
            return x + 1

    answers = []
    torch.fx.symbolic_trace(Asks())(X)
    assert answers == [False]


def test_a_class_patched_before_the_import_is_not_known():
    done = warm.run("""
import functools, torch, torch.nn as nn
nn.GELU.forward = lambda gelu, x, f=nn.GELU.forward: f(gelu, x)
nn.LayerNorm.forward = functools.wraps(nn.LayerNorm.forward)(lambda norm, x, f=nn.LayerNorm.forward: f(norm, x))
nn.Linear.forward = functools.partialmethod(nn.Linear.forward)
from t2t_timm import ops
for module in (nn.GELU(), nn.LayerNorm(3), nn.Linear(3, 3), nn.Dropout()):
    print(ops.can_fuse(torch.zeros(1), module))
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ['False', 'False', 'False', 'True']
