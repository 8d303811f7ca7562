"""A batch in parts is the batch."""
import pytest
import torch

from t2t_timm import ops
from t2t_timm.layers import TokensToToken
from t2t_timm.ops import parts


@pytest.fixture
def seen():
    return []


@pytest.fixture
def fn(seen):
    return lambda x: seen.append(len(x)) or 2 * x


def test_parts_keep_order_and_fit_the_threads(seen, fn, monkeypatch):
    monkeypatch.setattr(parts, 'TOKENS_PER_THREAD', 100)
    x = torch.randn(7, 1, 40, 44)  # of 110 tokens each at stride 4
    num_parts = -(-7 * 110 // (100 * torch.get_num_threads()))
    assert torch.equal(ops.in_parts(fn, x), 2 * x)
    assert sum(seen) == 7 and num_parts - 1 <= len(seen) <= num_parts and max(seen) == -(-7 // num_parts)


def test_whole_where_it_fits_and_where_others_decide(seen, fn, monkeypatch):
    ops.in_parts(fn, torch.randn(7, 1, 40, 44))
    monkeypatch.setattr(parts, 'TOKENS_PER_THREAD', 1)
    ops.in_parts(fn, torch.randn(7, 1, 40, 44, device='meta'))
    torch.jit.trace(lambda x: ops.in_parts(fn, x), torch.randn(7, 1, 40, 44), check_trace=False)
    torch.compile(lambda x: ops.in_parts(fn, x), backend='eager')(torch.randn(7, 1, 40, 44))
    assert set(seen) == {7}
    ops.in_parts(fn, torch.randn(7, 1, 40, 44))
    assert seen[-7:] == [1] * 7


@pytest.mark.parametrize('token_type', ['performer', 'transformer'])
@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('checkpointing', [False, True])
def test_tokens_to_token_in_parts_is_the_whole(monkeypatch, token_type, train, checkpointing):
    module = TokensToToken(token_type, token_drop_rate=0., dtype=torch.float64).train(train)
    module.grad_checkpointing = checkpointing
    x = torch.randn(5, 3, 30, 41, dtype=torch.float64)
    sizes, levels = [], TokensToToken._levels
    monkeypatch.setattr(TokensToToken, '_levels', lambda m, x, *args: sizes.append(len(x)) or levels(m, x, *args))

    def results(tokens_per_thread):
        monkeypatch.setattr(parts, 'TOKENS_PER_THREAD', tokens_per_thread)
        module.zero_grad()
        sizes.clear()
        out = module(x)
        seen = list(sizes)
        out.square().sum().backward()
        return seen, [out.detach()] + [p.grad.clone() for p in module.parameters()]

    (whole, expected), (chunks, actual) = results(2 ** 20), results(70)
    assert whole == [5] and len(chunks) > 1 and sum(chunks) == 5
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
