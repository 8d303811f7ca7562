"""Export, TorchScript, compilation and adapters, each on both sides of the switch."""
import pytest
import timm
import torch
import torch.nn as nn

from t2t_timm import set_fused

LINEAR = {
    'performer': (
        'patch_embed.attention1.kqv', 'patch_embed.attention1.proj', 'patch_embed.attention2.mlp.2',
        'patch_embed.project', 'blocks.1.attn.qkv', 'blocks.1.mlp.fc2'),
    'transformer': (
        'patch_embed.attention1.attn.qkv', 'patch_embed.attention2.attn.proj',
        'patch_embed.attention1.mlp.fc1', 'patch_embed.attention2.mlp.fc2'),
}


@pytest.fixture(params=LINEAR)
def model(request):
    torch.manual_seed(0)
    return timm.create_model(
        'test_t2t_vit', img_size=40, depth=2, token_type=request.param, token_drop_rate=0.).eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def expected(model, images):
    with set_fused(False):
        return model(images).detach()


def has_convolutions(graph):
    """Whether a graph has fused operations: the equations are linear maps."""
    return 'conv' in str(graph)


@torch.no_grad()
def test_export(model, images, expected, fused):
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), expected)
    assert has_convolutions(program.graph) == fused


@torch.no_grad()
def test_script_runs_the_equations(model, images, expected, fused, tmp_path):
    scripted = torch.jit.script(model)
    assert not has_convolutions(scripted.inlined_graph)
    torch.testing.assert_close(scripted(images), expected)
    torch.jit.save(scripted, tmp_path / 'model.pt')
    with set_fused(not fused):
        torch.testing.assert_close(torch.jit.load(tmp_path / 'model.pt')(images), expected)


@torch.no_grad()
def test_trace(model, images, expected, fused):
    traced = torch.jit.trace(model, images, check_trace=False)
    torch.testing.assert_close(traced(images), expected)
    torch.testing.assert_close(traced(images[:1]), expected[:1])
    assert has_convolutions(traced.inlined_graph) == fused


@pytest.mark.parametrize('model', ['performer'], indirect=True)
def test_a_compiled_model_is_compiled_again_when_the_switch_is_moved(model, images, expected):
    graphs = []

    def backend(module, _):
        graphs.append(module.graph)
        return module

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), expected)
        with set_fused(False):
            torch.testing.assert_close(compiled(images), expected)
        torch.testing.assert_close(compiled(images), expected)
    assert [has_convolutions(graph) for graph in graphs] == [True, False]  # the first one is kept


@pytest.mark.parametrize(
    'model, name', [(kind, name) for kind, names in LINEAR.items() for name in names], indirect=['model'])
def test_a_map_that_was_replaced_is_called_and_trained(model, name, images, called):
    """What may be fused around it is no reason to leave it out."""
    parent, _, child = name.rpartition('.')
    replaced = nn.Sequential(model.get_submodule(name), nn.Tanh())
    setattr(model.get_submodule(parent), child, replaced)
    model, images = model.double(), images.double()
    assert f'{name}.1' in called(model, images)

    def logits_and_gradient():
        logits = model(images)
        return logits, *torch.autograd.grad(logits.square().sum(), replaced.parameters())

    actual = logits_and_gradient()
    with set_fused(False):
        torch.testing.assert_close(actual, logits_and_gradient(), rtol=1e-9, atol=1e-11)
