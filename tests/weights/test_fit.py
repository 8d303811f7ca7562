"""State dicts on their way into a model: their names, what they look like, and the grid of their positions."""
import re

import published
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from published import prefixed, zeros
from safetensors.torch import save_file
from timm.models import load_checkpoint
from timm.models._hub import save_for_hf

from t2t_timm.cli import main
from t2t_timm.weights.fit import FIRST_LAYERS, first_layer, input_channels, looks_like
from t2t_timm.weights.names import find_weights

SMALL = dict(embed_dim=64, depth=1, num_heads=4, mlp_ratio=2.)


def make(img_size, architecture='t2t_vit_7', **kwargs):
    return timm.create_model(architecture, img_size=img_size, **dict(SMALL, **kwargs))


def resampled(table, old, new):
    """Resample a position table (1, 1 + N, C), from a grid to another."""
    grid = table[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, new, mode='bicubic', antialias=True)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def unlike(img_size):
    """A state dict of t2t_vit_7 for an image size, its position table no sinusoidal one."""
    state_dict = make(img_size).state_dict()
    return dict(state_dict, pos_embed=torch.randn(state_dict['pos_embed'].shape))


def by_load_state_dict(model, state_dict, folder):
    model.load_state_dict(state_dict)


def by_timms_load_checkpoint(model, state_dict, folder):
    torch.save({'state_dict': state_dict}, folder / 'a.pth')
    load_checkpoint(model, folder / 'a.pth')


def by_pretrained(model, state_dict, folder):
    loaded = make(model.patch_embed.img_size, pretrained=True, pretrained_cfg_overlay=dict(state_dict=state_dict))
    model.load_state_dict(loaded.state_dict())


ROUTES = pytest.mark.parametrize('route', [by_load_state_dict, by_timms_load_checkpoint, by_pretrained])


@ROUTES
@pytest.mark.parametrize('source, old', [(224, (14, 14)), (384, (24, 24)), (56, (4, 4)), ((40, 64), (3, 4))])
def test_positions_of_published_sizes_and_the_models_own_are_resampled(tmp_path, route, source, old):
    model, state_dict = make((40, 64)), unlike(source)
    route(model, state_dict, tmp_path)
    torch.testing.assert_close(model.pos_embed, resampled(state_dict['pos_embed'], old, (3, 4)))


@ROUTES
@pytest.mark.parametrize('source, tokens', [(96, 36), ((32, 128), 16 + 4), ((16, 64), 4)], ids=str)
def test_positions_of_no_known_grid_are_not_guessed(tmp_path, route, source, tokens):
    """36 tokens may be 6 x 6 or 4 x 9."""
    model, state_dict = make((40, 64)), unlike(source)
    state_dict['pos_embed'] = torch.randn(1, 1 + tokens, 64)
    with pytest.raises(ValueError, match=rf'positions of {tokens} tokens, this model of 3 x 4, and nothing says'):
        route(model, state_dict, tmp_path)


@pytest.mark.timm('1.0.31')
@pytest.mark.parametrize('source, old', [((64, 96), (4, 6)), ((96, 64), (6, 4)), ((64, 40), (4, 3))])
def test_positions_of_a_config_of_ones_own_are_known(tmp_path, source, old):
    model, state_dict = make(source), unlike(source)
    model.load_state_dict(state_dict)
    save_for_hf(model, tmp_path / 'own', model_args=dict(SMALL, img_size=source), safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path / "own"}', pretrained=True, img_size=(40, 64))
    expected = resampled(state_dict['pos_embed'], old, (3, 4))
    torch.testing.assert_close(again.pos_embed, expected)
    again.load_state_dict(again.state_dict())  # though its cfg says that 12 tokens are 4 x 3
    torch.testing.assert_close(again.pos_embed, expected)


@pytest.mark.parametrize('shape', [(), (1, 17), (1, 17, 8)], ids=str)
def test_senseless_positions_are_torchs_to_refuse(shape):
    model = make(56)
    with pytest.raises(RuntimeError, match='size mismatch for pos_embed'):
        model.load_state_dict(dict(model.state_dict(), pos_embed=torch.zeros(shape)))


@pytest.mark.slow
def test_every_architecture_looks_like_itself():
    same_shapes = {'t2t_vit_14_resnext': 't2t_vit_14'}  # it differs in the number of heads alone
    for architecture in timm.list_models('*t2t_vit*'):
        state_dict = timm.create_model(architecture, device='meta').state_dict()
        assert looks_like(state_dict) == same_shapes.get(architecture, architecture)
        if architecture != 't2t_vit_14_384':
            other = timm.create_model(architecture, device='meta', num_classes=3, in_chans=4, img_size=100)
            token_labeling = dict(other.state_dict(), **{'aux_head.weight': torch.zeros(3, 8)})
            weights, _ = find_weights(prefixed('module.', published.official(token_labeling)))
            assert looks_like(weights) == same_shapes.get(architecture, architecture)
    assert looks_like({'conv1.weight': torch.zeros(1)}) is None


@pytest.mark.parametrize('architecture, token_type', [
    *(('test_t2t_vit', token_type) for token_type in FIRST_LAYERS), ('t2t_vit_dense', 'performer')])
@pytest.mark.parametrize('in_chans', [1, 4])
def test_the_first_layer(architecture, token_type, in_chans):
    model = timm.create_model(architecture, token_type=token_type, in_chans=in_chans, device='meta')
    name = first_layer(model.state_dict())
    assert name == FIRST_LAYERS[token_type]
    assert input_channels(model.state_dict()) == in_chans
    called = []
    for child, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_hook(lambda m, args, out, child=child: called.append(child))
    model(torch.zeros(1, in_chans, *model.patch_embed.img_size, device='meta'))
    assert next(child for child in called if 'norm' not in child) == name


def test_every_cfg_names_the_first_layer_of_its_model():
    for architecture in timm.list_models('*t2t_vit*'):
        expected = first_layer(timm.create_model(architecture, device='meta').state_dict())
        for name in (architecture, *timm.list_pretrained(f'{architecture}.*')):
            assert timm.get_pretrained_cfg(name).first_conv == expected, name


# ---------------------------------------------------------------- official names

def tiny():
    """Weights of test_t2t_vit, none of which another model has."""
    generator = torch.Generator().manual_seed(2)
    return {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in published.tiny().items()}


def save(state_dict, folder):
    """Write a file as the authors do: averaged weights beside others, DDP's prefix; return its name."""
    torch.save({
        'state_dict': prefixed('module.', zeros(state_dict)), 'state_dict_ema': prefixed('module.', state_dict),
    }, folder / 'a.pth.tar')
    return str(folder / 'a.pth.tar')


def fresh(**kwargs):
    torch.manual_seed(1)
    return timm.create_model('test_t2t_vit', **kwargs)


def loaded_alone(state_dict, folder):
    model = fresh()
    model.load_state_dict(state_dict)
    return model


def loaded_assigned(state_dict, folder):
    model = fresh(device='meta')
    model.load_state_dict(state_dict, assign=True)
    return model


def loaded_in_a_wrapper(state_dict, folder):
    wrapper = nn.ModuleDict(dict(neck=nn.Linear(2, 2), backbone=nn.Sequential(fresh())))
    wrapper.load_state_dict({**prefixed('backbone.0.', state_dict), **prefixed('neck.', wrapper.neck.state_dict())})
    return wrapper.backbone[0]


def loaded_by_checkpoint_path(state_dict, folder):
    return fresh(checkpoint_path=save(state_dict, folder))


def loaded_by_pretrained_path_with_another_head(state_dict, folder):
    """As train.py has it: with num_classes=-1 the head is not loaded."""
    overlay = dict(file=save(state_dict, folder), num_classes=-1)
    model = fresh(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=10)
    assert not torch.equal(model.head.weight, state_dict['head.weight'])
    model.head.load_state_dict({k: state_dict[f'head.{k}'] for k in ('weight', 'bias')})
    return model


def loaded_from_a_folder(state_dict, folder):
    save_for_hf(fresh(), folder / 'out', safe_serialization=True)
    save_file(state_dict, folder / 'out' / 'model.safetensors')
    return timm.create_model(f'local-dir:{folder}/out', pretrained=True)


def loaded_by_resume_of_a_task(state_dict, folder):
    """As train.py's --resume calls it."""
    from timm.task import ClassificationTask, resume_task_checkpoint
    task = ClassificationTask(fresh(), nn.CrossEntropyLoss(), verbose=False)
    torch.save({'epoch': 3, 'version': 2, 'state_dict': prefixed('module.', state_dict)}, folder / 'run.pth.tar')
    assert resume_task_checkpoint(task, str(folder / 'run.pth.tar'), log_info=False) == 4
    return task.get_eval_model()


def loaded_after_convert(state_dict, folder):
    assert main(['convert', save(state_dict, folder), '--model', 'test_t2t_vit', '--out', str(folder / 'out')]) == 0
    return timm.create_model(f'local-dir:{folder}/out', pretrained=True)


@pytest.mark.parametrize('route', [
    loaded_alone, loaded_assigned, loaded_in_a_wrapper, loaded_by_checkpoint_path,
    loaded_by_pretrained_path_with_another_head, loaded_from_a_folder,
    *(pytest.param(route, marks=pytest.mark.timm('1.0.31')) for route in (
        loaded_by_resume_of_a_task, loaded_after_convert)),
])
def test_an_official_file_loads_strictly_by_every_route(route, tmp_path):
    weights = tiny()
    expected_model = fresh()
    expected_model.load_state_dict(weights)
    state_dict = published.official(weights)
    names = list(state_dict)
    model = route(state_dict, tmp_path)
    assert list(state_dict) == names and not any(name.startswith('patch_embed.') for name in names)
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert 'pos_embed' in dict(model.named_buffers()) and all(p.requires_grad for p in model.parameters())
    x = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        logits = expected_model.eval()(x)
        assert torch.equal(model.eval()(x), logits)
        assert (logits - fresh().eval()(x)).abs().max() > 0.1  # what nothing was loaded into gives others


@pytest.mark.parametrize('load, prefix', [(loaded_alone, ''), (loaded_in_a_wrapper, 'backbone.0.')])
def test_an_official_file_is_checked_as_strictly(load, prefix, tmp_path):
    state_dict = published.official(tiny())
    state_dict['tokens_to_token.more'] = state_dict.pop('tokens_to_token.project.bias')
    with pytest.raises(RuntimeError) as error:
        load(state_dict, tmp_path)
    assert f'Missing key(s) in state_dict: "{prefix}patch_embed.project.bias"' in str(error.value)
    assert f'Unexpected key(s) in state_dict: "{prefix}patch_embed.more"' in str(error.value)


TWICE = (
    'The state dict names the tokens-to-token module twice, {0}tokens_to_token.* and {0}patch_embed.*: keep one of '
    'them. Nothing was loaded.')


@pytest.fixture(params=['all', 'one official', 'one of the models'])
def mixed(request):
    """A state dict with names of both kinds."""
    ours, theirs = tiny(), published.official(tiny())
    own, official = 'patch_embed.project.bias', 'tokens_to_token.project.bias'
    return {
        'all': {**ours, **theirs}, 'one official': {**ours, official: theirs[official]},
        'one of the models': {**theirs, own: ours[own]}}[request.param]


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
def test_names_of_both_kinds_leave_a_model_as_it_was(mixed, prefix):
    model = fresh()
    module = nn.ModuleDict(dict(backbone=model)) if prefix else model
    before, names = {k: v.clone() for k, v in model.state_dict().items()}, list(mixed)
    for strict in (True, False):
        with pytest.raises(ValueError, match=f'^{re.escape(TWICE.format(prefix))}$'):
            module.load_state_dict(prefixed(prefix, mixed), strict=strict)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert list(mixed) == names


@pytest.mark.timm('1.0.31')  # convert says so
def test_names_of_both_kinds_in_a_file_are_told_in_a_sentence(mixed, tmp_path, capsys):
    file = save(mixed, tmp_path)
    for kwargs in (
            dict(checkpoint_path=file),
            dict(pretrained=True, pretrained_cfg_overlay=dict(file=file)),
            dict(pretrained=True, pretrained_cfg_overlay=dict(state_dict=mixed)),
    ):
        with pytest.raises(ValueError, match=f'^{re.escape(TWICE.format(""))}$'):
            fresh(**kwargs)
    assert main(['convert', file, '--model', 'test_t2t_vit', '--out', str(tmp_path / 'out')]) == 1
    assert capsys.readouterr().err == f't2t-timm convert: {file}: {TWICE.format("")}\n'
    assert [path.name for path in tmp_path.iterdir()] == ['a.pth.tar']
