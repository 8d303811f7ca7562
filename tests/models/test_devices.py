"""Devices without float64 (MPS): none of it on a tensor of the model's device, whatever a model goes through there.

This machine has no such device. The meta device stands for it where gradients are made, fake CUDA tensors where data
move between it and the CPU; a tensor mode refuses float64 on either.
"""
import pytest
import timm
import torch
from rounding import NoFloat64
from torch._subclasses import FakeTensorMode

from t2t_timm.commands.pictures import step_attention
from t2t_timm.weights.fit import adapt_stem

KINDS = {
    'performer': ('test_t2t_vit', dict(depth=2)),
    'transformer': ('test_t2t_vit', dict(depth=2, token_type='transformer')),
    'convolution': ('test_t2t_vit', dict(depth=2, token_type='convolution')),
    'se': ('t2t_vit_14_se', dict(depth=2, embed_dim=48, img_size=56)),
    'ghost': ('t2t_vit_16_ghost', dict(depth=2, embed_dim=48, img_size=56)),
    'dense': ('t2t_vit_dense', dict(block_config=(1, 1), img_size=56)),
}

BATCH = 512  # of few images, devices run the equations


@pytest.fixture(params=KINDS)
def create(request):
    name, kwargs = KINDS[request.param]
    return lambda **more: timm.create_model(name, **kwargs, **more)


@pytest.fixture
def model(create):
    return create().eval()


@pytest.fixture
def expected_shapes(create, in_chans):
    return {k: v.shape for k, v in create(in_chans=in_chans, device='meta').state_dict().items()}


@pytest.fixture
def device(model):  # which cannot be made of fake tensors
    """The name of a device of fake tensors that refuses float64."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        try:
            torch.empty(1).to('cuda')
        except RuntimeError as e:
            pytest.skip(
                f'torch {torch.__version__} makes fake CUDA tensors with a driver alone; install a newer torch: '
                f'{str(e).splitlines()[0]}')
        with NoFloat64('cuda'):
            yield 'cuda'


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])  # autocast does not know the meta device
def test_training_step(create, fused, dtype):
    with NoFloat64('meta'):
        model = create(device='meta', dtype=dtype).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        logits = model(torch.empty(BATCH, 3, 56, 56, device='meta', dtype=dtype))
        torch.nn.functional.cross_entropy(logits, torch.empty(BATCH, dtype=torch.long, device='meta')).backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())


def test_moved_and_called(model, device, fused):
    logits = model.to(device)(torch.empty(BATCH, 3, 56, 56, device=device))
    assert logits.device.type == device and logits.dtype == torch.float32


@pytest.mark.parametrize('in_chans', [1, 5])
def test_stem_adapts_to_other_channels(expected_shapes, model, device, in_chans):
    adapted = adapt_stem({k: v.to(device) for k, v in model.state_dict().items()}, in_chans)
    assert {v.device.type for v in adapted.values()} == {device}
    assert {v.dtype for v in adapted.values()} == {torch.float32}
    assert {k: v.shape for k, v in adapted.items()} == expected_shapes


@pytest.mark.parametrize('create', ['performer', 'transformer'], indirect=True)
def test_the_attention_that_pictures_show(model, device):
    step = model.to(device).patch_embed.attention1
    attention, kept = step_attention(step, torch.empty(1, 3, 56, 56, device=device), torch.tensor([3, 100]))
    assert attention.device.type == kept.device.type == 'cpu'
    assert attention.shape == (2, 14 * 14) and kept.shape == (2,)


@pytest.mark.parametrize('create', ['performer'], indirect=True)
def test_the_mode_refuses(device):
    x = torch.empty(2, device=device)
    with pytest.raises(TypeError, match='no float64'):
        x.double()
    assert x.cpu().double().dtype == torch.float64
