"""Who executes the operations, and a batch in chunks, which is the batch."""
import pytest
import torch
import torch.nn as nn
from functorch.compile import aot_function, nop
from torch.fx.experimental.proxy_tensor import make_fx

from t2t_timm import ops
from t2t_timm.layers import TokensToToken
from t2t_timm.ops import execution
from t2t_timm.ops.execution import is_compiled, is_traced


def test_who_runs_the_operations():
    """`is_traced` and `is_compiled`, asked in the middle of each."""
    def ask(x):
        answers.append((is_traced(), is_compiled()))
        return x + 1.

    class Asks(nn.Module):
        def forward(self, x):
            return (x + 1. if is_traced() else x + 2.) + (10. if is_compiled() else 20.)

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
    for pre_dispatch in (False, True):
        make_fx(ask, pre_dispatch=pre_dispatch)(x)
    aot_function(ask, nop)(x)
    torch.func.functionalize(ask)(x)
    assert len(answers) >= 9 and set(answers) == {(True, True)}
    assert Asks()(x)[0] == 22.
    told_apart = hasattr(torch.compiler, 'is_exporting')  # from torch 2.7 on
    assert torch.compile(Asks(), backend='eager', fullgraph=True)(x)[0] == (12. if told_apart else 11.)
    if told_apart:
        assert torch.export.export(Asks(), (x,)).module()(x)[0] == 11.


@pytest.fixture
def seen():
    return []


@pytest.fixture
def fn(seen):
    return lambda x: seen.append(len(x)) or 2 * x


def test_chunks_keep_order_and_fit_the_threads(seen, fn, monkeypatch):
    monkeypatch.setattr(execution, 'TOKENS_PER_THREAD', 100)
    x = torch.randn(7, 1, 40, 44)
    num_chunks = -(-7 * 110 // (100 * torch.get_num_threads()))
    assert torch.equal(ops.in_chunks(fn, x, 110), 2 * x)
    assert sum(seen) == 7 and num_chunks - 1 <= len(seen) <= num_chunks and max(seen) == -(-7 // num_chunks)


def test_whole_where_it_fits_and_where_others_decide(seen, fn, monkeypatch):
    ops.in_chunks(fn, torch.randn(7, 1, 40, 44), 110)
    monkeypatch.setattr(execution, 'TOKENS_PER_THREAD', 1)
    ops.in_chunks(fn, torch.randn(7, 1, 40, 44, device='meta'), 110)
    torch.jit.trace(lambda x: ops.in_chunks(fn, x, 110), torch.randn(7, 1, 40, 44), check_trace=False)
    torch.compile(lambda x: ops.in_chunks(fn, x, 110), backend='eager')(torch.randn(7, 1, 40, 44))
    assert set(seen) == {7}
    ops.in_chunks(fn, torch.randn(7, 1, 40, 44), 110)
    assert seen[-7:] == [1] * 7


@pytest.mark.parametrize('token_type', ['performer', 'transformer'])
@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_tokens_to_token_in_chunks_is_the_whole(monkeypatch, token_type, train, checkpointing):
    module = TokensToToken(
        token_type, img_size=(30, 41), token_drop_rate=0., dtype=torch.float64).train(train)
    module.grad_checkpointing = checkpointing
    x = torch.randn(5, 3, 30, 41, dtype=torch.float64)
    sizes, in_chunks = [], ops.in_chunks
    monkeypatch.setattr(ops, 'in_chunks', lambda fn, x, n: in_chunks(lambda x: sizes.append(len(x)) or fn(x), x, n))

    def results(tokens_per_thread):
        monkeypatch.setattr(execution, 'TOKENS_PER_THREAD', tokens_per_thread)
        module.zero_grad()
        sizes.clear()
        out = module(x)
        calls = list(sizes)  # a checkpoint calls again in the gradient
        out.square().sum().backward()
        return calls, [out.detach()] + [p.grad.clone() for p in module.parameters()]

    (whole, expected), (chunks, actual) = results(2 ** 20), results(70)
    assert whole == [5, 5] and len(chunks) > 2 and sum(chunks) == 10
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def test_calls_that_somebody_looks_at_are_not_divided(monkeypatch):
    monkeypatch.setattr(execution, 'TOKENS_PER_THREAD', 1)
    module = TokensToToken(img_size=32).eval()
    x, sizes = torch.randn(5, 3, 32, 32), []
    handle = module.attention2.mlp.register_forward_hook(lambda m, args, out: sizes.append(len(out)))
    hooked = module(x)
    handle.remove()
    assert sizes == [5]
    torch.testing.assert_close(module(x), hooked)
