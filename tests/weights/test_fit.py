"""State dicts on their way into a model: what they look like, and the grid of their positions."""
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import load_checkpoint
from timm.models._hub import save_for_hf

from t2t_timm.weights.fit import looks_like

SMALL = dict(embed_dim=64, depth=1, num_heads=4, mlp_ratio=2.)


def make(img_size, architecture='t2t_vit_7', **kwargs):
    return timm.create_model(architecture, img_size=img_size, **dict(SMALL, **kwargs))


def resampled(table, old, new):
    """Resample a position table (1, 1 + N, C), from a grid to another."""
    grid = table[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, new, mode='bicubic', antialias=True)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


@pytest.fixture
def unlike():
    """A state dict of t2t_vit_7 for an image size, its position table no sinusoidal one."""
    def unlike(img_size):
        state_dict = make(img_size).state_dict()
        return dict(state_dict, pos_embed=torch.randn(state_dict['pos_embed'].shape))
    return unlike


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
@pytest.mark.parametrize('source, old', [(224, (14, 14)), (384, (24, 24)), (56, (4, 4))])
def test_positions_of_published_sizes_are_resampled(unlike, tmp_path, route, source, old):
    model, state_dict = make((40, 64)), unlike(source)
    route(model, state_dict, tmp_path)
    torch.testing.assert_close(model.pos_embed, resampled(state_dict['pos_embed'], old, (3, 4)))


@ROUTES
@pytest.mark.parametrize('source, tokens', [(96, 36), ((32, 128), 16 + 4), ((16, 64), 4)], ids=str)
def test_positions_of_no_known_grid_are_not_guessed(unlike, tmp_path, route, source, tokens):
    """36 tokens may be 6 x 6 or 4 x 9."""
    model, state_dict = make((40, 64)), unlike(source)
    state_dict['pos_embed'] = torch.randn(1, 1 + tokens, 64)
    with pytest.raises(ValueError, match=rf'positions of {tokens} tokens, this model of 3 x 4, and nothing says'):
        route(model, state_dict, tmp_path)


@ROUTES
def test_positions_of_the_models_own_number_are_its_own(unlike, tmp_path, route):
    model, state_dict = make((40, 64)), unlike((40, 64))
    route(model, state_dict, tmp_path)
    assert torch.equal(model.pos_embed, state_dict['pos_embed'])


@pytest.mark.parametrize('source, old', [((64, 96), (4, 6)), ((96, 64), (6, 4)), ((64, 40), (4, 3))])
def test_positions_of_a_config_of_ones_own_are_known(unlike, tmp_path, source, old):
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
            assert looks_like({f'module.{k}': v for k, v in token_labeling.items()}) == same_shapes.get(
                architecture, architecture)
    assert looks_like({'conv1.weight': torch.zeros(1)}) is None
