"""The MLP that keeps less for its gradient, against timm's in float64."""
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Mlp as TimmMlp

import t2t_timm  # noqa: F401  (a plain checkout has no start-up hook)
from t2t_timm.layers import Mlp


def run(mlp, x, grad):
    """Return output and gradients of input and parameters."""
    x = x.clone().requires_grad_()
    out = mlp(x)
    return [out.detach(), *torch.autograd.grad(out, [x, *mlp.parameters()], grad)]


@settings(max_examples=20, deadline=None)
@given(
    batch=st.integers(1, 4),
    tokens=st.sampled_from([1, 7, 255, 256, 700]),
    dim=st.integers(1, 40),
    hidden=st.sampled_from([1, 7, 40, 1300]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_mlp_is_timms(batch, tokens, dim, hidden, bias, dtype):
    reference = TimmMlp(dim, hidden, bias=bias).double()
    mlp = Mlp(dim, hidden, bias=bias).to(dtype)
    mlp.load_state_dict(reference.state_dict())
    x, grad = torch.randn(2, batch, tokens, dim).unbind(0)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    expected = run(reference, x.double(), grad.double())
    for ours, theirs in zip(run(mlp, x.to(dtype), grad.to(dtype)), expected, strict=True):
        assert (ours - theirs).norm() <= tolerance * (theirs.norm() + 1.)


@pytest.mark.parametrize('tokens', [3, 1200])
def test_frozen_weights_get_no_gradient_and_pass_it_on(tokens):
    mlp = Mlp(128, 256)
    x = torch.randn(1, tokens, 128, requires_grad=True)
    expected, = torch.autograd.grad(mlp(x).square().sum(), x)
    mlp.requires_grad_(False)
    mlp(x).square().sum().backward()
    torch.testing.assert_close(x.grad, expected)
    assert all(p.grad is None for p in mlp.parameters())


def test_gradients_of_each_sample():
    """torch.func, as differential privacy and influence functions use it."""
    model = timm.create_model('test_t2t_vit', token_drop_rate=0.).eval()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    images = torch.randn(3, *model.pretrained_cfg['input_size'])

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image.unsqueeze(0),)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images)
    for i, image in enumerate(images):
        model.zero_grad()
        loss(dict(model.named_parameters()), image).backward()
        for name, p in model.named_parameters():
            torch.testing.assert_close(per_sample[name][i], p.grad, rtol=1e-3, atol=1e-4)


def test_keeps_the_hidden_tokens_and_not_their_activation():
    mlp, kept = Mlp(8, 64), []
    x = torch.randn(2, 5, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        mlp(x)
    assert sum(t.numel() == 2 * 5 * 64 for t in kept) == 1


@pytest.mark.parametrize('name', ['fc1', 'act', 'drop1', 'norm', 'fc2', 'drop2'])
def test_a_hook_sees_its_module(name):
    mlp, seen = Mlp(8, 16), []
    getattr(mlp, name).register_forward_hook(lambda *args: seen.append(name))
    mlp(torch.randn(1, 3, 8, requires_grad=True))
    assert seen == [name]


def test_dropout_and_other_activations_are_timms():
    x = torch.randn(2, 5, 8)
    torch.manual_seed(0)
    reference = TimmMlp(8, 16, act_layer=torch.nn.SiLU, norm_layer=torch.nn.LayerNorm, drop=0.3)
    mlp = Mlp(8, 16, act_layer=torch.nn.SiLU, norm_layer=torch.nn.LayerNorm, drop=0.3)
    mlp.load_state_dict(reference.state_dict())
    outputs = []
    for module in (reference, mlp):
        torch.manual_seed(1)
        outputs.append(module(x))
    assert torch.equal(*outputs)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_that_timm_gives(dtype):
    reference, mlp = TimmMlp(8, 16), Mlp(8, 16)
    mlp.load_state_dict(reference.state_dict())
    x = torch.randn(1, 1200, 8, requires_grad=True)
    outputs = []
    for module in (reference, mlp):
        with torch.autocast('cpu', dtype):
            out = module(x)
        out.float().square().sum().backward()
        outputs.append([out, *(p.grad for p in module.parameters())])
    for ours, theirs in zip(*outputs, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).float().norm() <= 2e-2 * theirs.float().norm()
