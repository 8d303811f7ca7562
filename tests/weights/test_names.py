"""The official names: wrappers, prefixes, the auxiliary head, and what the names say of a model."""
import pytest
import timm
import torch

from t2t_timm.weights.names import first_layer, input_channels, rename_keys, token_type

ARCHITECTURES = ('t2t_vit_7', 't2t_vit_t_14', 't2t_vit_c_14', 't2t_vit_dense', 'test_t2t_vit')


@pytest.mark.parametrize('wrapper, second', [
    ('state_dict_ema', 'model_ema'), ('model_ema', 'state_dict'), ('state_dict', 'model'), ('model', 'optimizer')])
def test_the_first_wrapper_in_timms_order_is_taken(wrapper, second):
    weights = {'module.norm.weight': torch.ones(1), 'module.aux_head.weight': torch.ones(1)}
    checkpoint = {second: {'norm.weight': torch.zeros(1)}, wrapper: weights, 'epoch': 3}
    assert rename_keys(checkpoint) == {'norm.weight': torch.ones(1)}


@pytest.mark.parametrize('architecture', ARCHITECTURES)
@pytest.mark.parametrize('in_chans', [1, 3, 4])
def test_the_first_layer(architecture, in_chans):
    model = timm.create_model(architecture, in_chans=in_chans, device='meta')
    name = first_layer(model.state_dict())
    assert model.pretrained_cfg['first_conv'] == name
    assert input_channels(model.state_dict()) == in_chans
    called = []
    for child, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda m, args, out, child=child: called.append(child))
    model(torch.zeros(1, in_chans, *model.patch_embed.img_size, device='meta'))
    assert next(child for child in called if 'norm' not in child) == name


@pytest.mark.parametrize('shape', [(), (4,), (4, 50), (4, 3, 7)], ids=str)
def test_a_senseless_first_layer_says_nothing_of_channels(shape):
    assert input_channels({'patch_embed.attention1.kqv.weight': torch.zeros(shape)}) == 0


def test_token_types_are_those_of_the_models():
    modules = {'performer': 'TokenPerformer', 'transformer': 'TokenTransformer', 'convolution': 'Conv2d'}
    for architecture in timm.list_models('*t2t_vit*'):
        first = next(timm.create_model(architecture, device='meta').patch_embed.children())
        assert type(first).__name__ == modules[token_type(architecture)], architecture
