"""What pretrained=True does on the way from a file to a model: sources, adaptation, checkpoints of the wrong shape."""
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from timm.models import get_pretrained_cfg, resolve_model_input_args
from timm.models._hub import save_for_hf

from t2t_timm.hub import download
from t2t_timm.hub.manifest import load_manifest
from t2t_timm.models import _builder
from t2t_timm.models._checkpoint import looks_like

sys.path.insert(0, str(Path(__file__).parents[1] / 'data'))
from golden_weights import deterministic_images, deterministic_state  # noqa: E402

SMALL = dict(embed_dim=64, depth=2, num_heads=4, mlp_ratio=2., img_size=64)
ONE_OF_EACH_TOKEN_TYPE = ('t2t_vit_7', 't2t_vit_t_14', 't2t_vit_c_14')  # performer, transformer, convolution


@pytest.fixture
def golden_file(tmp_path):
    """Save an architecture's golden weights; every one is made with SMALL."""
    def save(architecture: str) -> str:
        state_dict = timm.create_model(architecture, **SMALL).state_dict()
        golden = deterministic_state({k: v.shape for k, v in state_dict.items()})
        state_dict.update({k: torch.from_numpy(v).float() for k, v in golden.items()})
        file = tmp_path / f'{architecture}.safetensors'
        safetensors.torch.save_file(state_dict, file)
        return str(file)
    return save


def load(architecture, file, **kwargs):
    overlay = dict(file=file, num_classes=1000)
    return timm.create_model(
        architecture, pretrained=True, pretrained_cfg_overlay=overlay, **dict(SMALL, **kwargs)).eval()


def relative_error(x: torch.Tensor, expected: torch.Tensor) -> float:
    return ((x - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize('architecture', ONE_OF_EACH_TOKEN_TYPE)
@torch.no_grad()
def test_grey_images_give_one_channel_what_three_gave(golden_file, architecture):
    file = golden_file(architecture)
    grey = torch.from_numpy(deterministic_images(2, 64)).float()[:, :1]
    expected = load(architecture, file)
    model = load(architecture, file, in_chans=1)
    assert relative_error(model(grey), expected(grey.expand(-1, 3, -1, -1))) < 1e-5
    other = torch.flip(grey, dims=[-1])
    assert relative_error(model(other), expected(grey.expand(-1, 3, -1, -1))) > 1e-3


@pytest.mark.parametrize('architecture', ONE_OF_EACH_TOKEN_TYPE)
@torch.no_grad()
def test_other_classes_get_a_new_head_and_keep_the_rest(golden_file, architecture):
    file = golden_file(architecture)
    grey = torch.from_numpy(deterministic_images(2, 64)).float()[:, :1]
    expected = load(architecture, file)
    model = load(architecture, file, in_chans=1, num_classes=5)
    assert model(grey).shape == (2, 5)
    features = expected.forward_head(expected.forward_features(grey.expand(-1, 3, -1, -1)), pre_logits=True)
    assert relative_error(model.forward_head(model.forward_features(grey), pre_logits=True), features) < 1e-5


@pytest.mark.parametrize('architecture', ONE_OF_EACH_TOKEN_TYPE)
@torch.no_grad()
def test_the_pyramid_takes_pretrained_weights_too(golden_file, architecture):
    file = golden_file(architecture)
    images = torch.from_numpy(deterministic_images(1, 64)).float()
    expected = load(architecture, file).forward_intermediates(images, indices=1, intermediates_only=True)[-1]
    maps = load(architecture, file, features_only=True)(images)
    assert relative_error(maps[-1], expected) < 1e-5


@pytest.fixture
def fetched(monkeypatch, golden_file):
    """Stand in for the download; gives the names that were asked for."""
    names = []

    def pretrained_file(name, cache_dir=None):
        names.append(name)
        return golden_file('t2t_vit_7')
    monkeypatch.setattr(_builder, 'pretrained_file', pretrained_file)
    return names


def test_tags_of_the_manifest_are_fetched_and_checked_by_us(fetched, tmp_path):
    model = timm.create_model('t2t_vit_7', pretrained=True, **SMALL)
    timm.create_model('t2t_vit_7.in1k', pretrained=True, **SMALL)
    timm.create_model('t2t_vit_7', pretrained=True, pretrained_cfg='in1k', **SMALL)
    timm.create_model('t2t_vit_7', pretrained=True, pretrained_cfg_overlay=dict(crop_pct=1.0), **SMALL)
    timm.create_model('t2t_vit_14.in1k_ft_cifar10', pretrained=True, **SMALL, num_classes=7)
    # timm's scripts hand over the whole cfg of a tag
    timm.create_model(**resolve_model_input_args('t2t_vit_7.in1k', img_size=64), pretrained=True, **{
        k: v for k, v in SMALL.items() if k != 'img_size'})
    assert fetched == ['t2t_vit_7.in1k'] * 4 + ['t2t_vit_14.in1k_ft_cifar10', 't2t_vit_7.in1k']
    assert model.pretrained_cfg.get('file') is None
    save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
    assert str(tmp_path) not in (tmp_path / 'saved' / 'config.json').read_text()


@pytest.mark.parametrize('kwargs', [{}, dict(features_only=True), dict(features_only=True, feature_cls='getter')])
def test_no_path_of_this_machine_stays_in_a_cfg(fetched, tmp_path, kwargs):
    model = timm.create_model('t2t_vit_7', pretrained=True, **SMALL, **kwargs)
    cfgs = [vars(m)['pretrained_cfg'] for m in model.modules() if 'pretrained_cfg' in vars(m)]
    assert cfgs and all('file' not in cfg for cfg in cfgs)


def test_without_pretrained_nothing_is_fetched(fetched):
    timm.create_model('t2t_vit_7.in1k', **SMALL)
    assert fetched == []


def test_sources_that_the_user_names_go_to_timm(fetched, golden_file, tmp_path):
    file = golden_file('t2t_vit_7')
    model = load('t2t_vit_7', file)
    timm.create_model('t2t_vit_7', pretrained=True, **SMALL, pretrained_cfg_overlay=dict(
        state_dict=model.state_dict()))
    cfg = dict(get_pretrained_cfg('t2t_vit_7.in1k').to_dict(), file=file)
    timm.create_model('t2t_vit_7', pretrained=True, pretrained_cfg=cfg, **SMALL)
    save_for_hf(model, tmp_path / 'dir', model_args=SMALL, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path / "dir"}', pretrained=True)
    assert fetched == []
    assert torch.equal(again.head.weight, model.head.weight)


@pytest.mark.parametrize('asked, given', [('t2t_vit_7', 't2t_vit_10'), ('t2t_vit_7', 't2t_vit_t_14')])
def test_a_checkpoint_of_the_wrong_shape_names_what_it_looks_like(asked, given):
    state_dict = {k: torch.zeros(v.shape) for k, v in timm.create_model(given, device='meta').state_dict().items()}
    with pytest.raises(ValueError, match=f'This checkpoint looks like {given}, not like {asked}\\.'):
        timm.create_model(asked, pretrained=True, pretrained_cfg_overlay=dict(state_dict=state_dict))


def test_a_checkpoint_of_something_else_says_so():
    with pytest.raises(ValueError, match='holds no T2T-ViT: .* it begins with conv1.weight'):
        timm.create_model('t2t_vit_7', pretrained=True, **SMALL, pretrained_cfg_overlay=dict(
            state_dict={'conv1.weight': torch.zeros(1)}))


def test_a_model_of_ones_own_making_may_take_what_fits(golden_file):
    """pretrained_strict=False is timm's way to load part of a checkpoint."""
    file = golden_file('t2t_vit_7')
    model = load('t2t_vit_7', file, depth=1, pretrained_strict=False)
    assert torch.equal(model.blocks[0].attn.qkv.weight, load('t2t_vit_7', file).blocks[0].attn.qkv.weight)


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


@pytest.fixture
def small_file(tmp_path):
    file = tmp_path / 'file.bin'
    file.write_bytes(b'abc')
    return file


SHA256_OF_ABC = 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'  # FIPS 180-2, appendix B.1
SHA384_OF_ABC = (
    'cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed8086072ba1e7cc2358baeca134c825a7')


def test_a_file_is_compared_with_all_that_is_known(small_file):
    known = dict(size=3, sha256=SHA256_OF_ABC, sha384=SHA384_OF_ABC.upper(), sha256_prefix=SHA256_OF_ABC[:8])
    assert download.check_file(small_file, known, 'x') == ['size', 'sha256', 'sha384', 'sha256_prefix']
    assert download.check_file(small_file, {}, 'x') == []


@pytest.mark.parametrize('known', [
    dict(size=4), dict(sha256='0' * 64), dict(sha384='0' * 96), dict(sha256_prefix='00000000'),
    dict(size=3, sha256=SHA256_OF_ABC, sha384='0' * 96)])
def test_a_file_that_differs_is_refused_with_both_values(small_file, known):
    key, value = list(known.items())[-1]
    with pytest.raises(download.IntegrityError, match=f'the {key} of file.bin should be {value} but is [0-9a-f]+'):
        download.check_file(small_file, known, 'x')
    assert small_file.exists()  # only what was downloaded is deleted


def test_the_file_inside_the_package_is_checked_too(monkeypatch, small_file):
    entry = load_manifest()['weights']['test_t2t_vit.mnist']
    monkeypatch.setitem(entry, 'path', str(small_file))
    monkeypatch.setitem(entry, 'sha256', '0' * 64)
    with pytest.raises(download.IntegrityError, match='should be 0{64} but is ba7816bf'):
        timm.create_model('test_t2t_vit', pretrained=True)
