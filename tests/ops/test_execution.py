"""A batch in chunks is the batch, and stays whole where something else decides how it is computed."""
import pytest
import torch
from functorch.compile import aot_function, nop
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from t2t_timm import ops
from t2t_timm.layers import TokensToToken

MANY = 2 ** 20  # tokens of an image, more than are computed at once


@pytest.fixture
def seen():
    """Sizes of the batches that the next function was called with."""
    return []


@pytest.fixture
def double(seen):
    return lambda x: seen.append(len(x)) or 2 * x


def test_chunks_keep_order_and_are_smaller_the_more_tokens_an_image_has(seen, double):
    x, numbers = torch.randn(7, 1, 2, 2), []
    for power in range(21):
        seen.clear()
        assert torch.equal(ops.in_chunks(double, x, 2 ** power), 2 * x)
        assert sum(seen) == 7 and max(seen) == -(-7 // len(seen))
        numbers.append(len(seen))
    assert numbers == sorted(numbers) and {1, 7} < set(numbers)


def test_whole_where_others_decide(seen, double):
    def run(x):
        return ops.in_chunks(double, x, MANY)

    x = torch.randn(7, 1, 2, 2)
    run(x.to('meta'))
    torch.jit.trace(run, x, check_trace=False)
    torch.func.vmap(run)(x[None])
    torch.func.grad(lambda x: run(x).sum())(x)
    torch.func.jvp(run, (x,), (x,))
    with forward_ad.dual_level():
        run(x)
    for pre_dispatch in (False, True):
        make_fx(run, pre_dispatch=pre_dispatch)(x)
    aot_function(run, nop)(x)
    torch.func.functionalize(run)(x)
    torch.compile(run, backend='eager')(x)
    assert len(seen) >= 10 and set(seen) == {7}
    run(x)
    assert seen[-7:] == [1] * 7


@pytest.mark.parametrize('token_type', ['performer', 'transformer'])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_tokens_to_token_in_chunks_is_the_whole(token_type, checkpointing, monkeypatch):
    module = TokensToToken(
        token_type, in_chans=1, embed_dim=32, img_size=(30, 41), token_drop_rate=0., dtype=torch.float64)
    module.grad_checkpointing = checkpointing
    number = 200 * torch.get_num_threads()  # more than the threads take at once
    x = torch.randn(number, 1, 30, 41, dtype=torch.float64)
    sizes, in_chunks = [], ops.in_chunks
    monkeypatch.setattr(ops, 'in_chunks', lambda fn, x, n: in_chunks(lambda x: sizes.append(len(x)) or fn(x), x, n))

    def results(batches):
        module.zero_grad()
        sizes.clear()
        out = torch.cat([module(batch) for batch in batches])
        calls = list(sizes)  # a checkpoint calls again in the gradient
        out.square().sum().backward()
        return calls, [out.detach()] + [p.grad.clone() for p in module.parameters()]

    (whole, expected), (chunks, actual) = results(x.split(40)), results([x])
    assert set(whole) == {40} and max(chunks[:-1]) < number and sum(chunks) == sum(whole) == 2 * number
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
