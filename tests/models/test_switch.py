"""Export, TorchScript, compilation and adapters, each on both sides of the switch."""
import copy

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


def count(graph, name):
    """Calls of functions; `unfold` is a method of tensors too, which gives a view."""
    return sum(name in str(node.target) for node in graph.nodes if node.op == 'call_function')


@torch.no_grad()
def test_export(model, images, expected, fused):
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), expected)
    convolutions, unfolds = count(program.graph, 'conv2d'), count(program.graph, 'im2col')
    assert (convolutions, unfolds) == ((2, 0) if fused else (0, 3))


@torch.no_grad()
def test_script(model, images, expected, fused, tmp_path):
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(images), expected)
    torch.jit.save(scripted, tmp_path / 'model.pt')
    with set_fused(not fused):
        torch.testing.assert_close(torch.jit.load(tmp_path / 'model.pt')(images), expected)


@torch.no_grad()
def test_trace(model, images, expected, fused):
    traced = torch.jit.trace(model, images, check_trace=False)
    torch.testing.assert_close(traced(images), expected)
    graph = str(traced.inlined_graph)
    assert (graph.count('aten::_convolution'), graph.count('aten::im2col')) == ((2, 0) if fused else (0, 3))


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
    assert len(graphs) == 2  # the first one is kept
    unfolds, convolutions = ([count(graph, name) for graph in graphs] for name in ('unfold', 'conv2d'))
    assert unfolds == [0, 3] and convolutions == [2, 0]


class LoRA(nn.Module):
    """A low-rank adapter around a frozen linear map, as PEFT's."""

    def __init__(self, inner, rank=2):
        super().__init__()
        self.inner = inner.requires_grad_(False)
        self.a, self.b = nn.Linear(inner.in_features, rank, bias=False), nn.Linear(rank, inner.out_features, bias=False)

    def forward(self, x):
        return self.inner(x) + self.b(self.a(x))


def test_adapters(model, images, fused, called):
    """Logits and the adapters' gradients are those of weights with the adapters merged into them."""
    names = next(names for names in LINEAR.values() if all(n in dict(model.named_modules()) for n in names))
    model, images = model.double(), images.double()
    merged = copy.deepcopy(model)
    for name in names:
        parent, _, child = name.rpartition('.')
        adapter = LoRA(model.get_submodule(name)).double()
        setattr(model.get_submodule(parent), child, adapter)
        merged.get_submodule(name).weight.data += (adapter.b.weight @ adapter.a.weight).detach()
    assert {f'{name}.a' for name in names} <= set(called(model, images))
    logits = model(images)
    logits.square().sum().backward()
    with set_fused(False):
        expected = merged(images)
        expected.square().sum().backward()
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-11)
    for name in names:
        adapter, gradient = model.get_submodule(name), merged.get_submodule(name).weight.grad
        torch.testing.assert_close(adapter.b.weight.grad, gradient @ adapter.a.weight.T, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(adapter.a.weight.grad, adapter.b.weight.T @ gradient, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize('index', range(len(LINEAR['performer'])))
def test_each_adapter_alone_is_called(images, called, index):
    """What may be fused around it is no reason to leave it out."""
    torch.manual_seed(0)
    model = timm.create_model('test_t2t_vit', img_size=40, depth=2).double().eval()
    name, images = LINEAR['performer'][index], images.double()
    parent, _, child = name.rpartition('.')
    adapter = LoRA(model.get_submodule(name)).double()
    setattr(model.get_submodule(parent), child, adapter)
    assert f'{name}.a' in called(model, images)
    logits = model(images)
    with set_fused(False):
        torch.testing.assert_close(logits, model(images), rtol=1e-9, atol=1e-11)
