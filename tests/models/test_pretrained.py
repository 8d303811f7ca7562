"""What pretrained=True does on the way from a file to a model: sources, adaptation, checkpoints of the wrong shape."""
import logging
import re
from dataclasses import replace

import published
import pytest
import timm
import torch
from timm.models import get_pretrained_cfg
from timm.models._hub import save_for_hf

from t2t_timm.weights.manifest import load_manifest

SMALL = dict(embed_dim=64, depth=2, num_heads=4, mlp_ratio=2., img_size=64)
ONE_OF_EACH_TOKEN_TYPE = ('t2t_vit_7', 't2t_vit_t_14', 't2t_vit_c_14')  # performer, transformer, convolution


@pytest.fixture
def golden_file(tmp_path):
    """A function that saves an architecture's golden weights, made with SMALL."""
    def save(architecture: str) -> str:
        file = str(tmp_path / f'{architecture}.safetensors')
        published.save_file(published.golden_model(architecture, **SMALL).state_dict(), file)
        return file
    return save


def load(architecture, file, **kwargs):
    overlay = dict(file=file, num_classes=1000)
    return timm.create_model(
        architecture, pretrained=True, pretrained_cfg_overlay=overlay, **dict(SMALL, **kwargs)).eval()


@pytest.mark.timm('1.0.31')
@pytest.mark.parametrize('architecture', ONE_OF_EACH_TOKEN_TYPE)
@torch.no_grad()
def test_other_channels_and_classes_keep_the_rest(golden_file, architecture):
    """Grey images give one channel what they gave three."""
    file, grey = golden_file(architecture), published.images(2, 64)[:, :1]
    expected, model = load(architecture, file), load(architecture, file, in_chans=1, num_classes=5)
    features = expected.forward_features(grey.expand(-1, 3, -1, -1))
    assert published.rel_error(model.forward_features(grey), features) < 1e-5
    assert published.rel_error(model.forward_features(grey.flip(-1)), features) > 1e-3
    assert model(grey).shape == (2, 5)


@pytest.mark.parametrize('architecture', ONE_OF_EACH_TOKEN_TYPE)
@torch.no_grad()
def test_the_pyramid_takes_pretrained_weights_too(golden_file, architecture):
    file = golden_file(architecture)
    images = published.images(1, 64)
    expected = load(architecture, file).forward_intermediates(images, indices=1, intermediates_only=True)[-1]
    maps = load(architecture, file, features_only=True)(images)
    assert published.rel_error(maps[-1], expected) < 1e-5


@pytest.fixture
def fetched(monkeypatch, caplog, golden_file):
    """A function that gives the tags whose weights were asked for; their files are said to be in the package."""
    caplog.set_level(logging.INFO)
    weights, known = load_manifest()['weights'], dict(size=None, sha256=None, sha384=None, sha256_prefix=None)
    for name in ('t2t_vit_7.in1k', 't2t_vit_14.in1k_ft_cifar10'):
        monkeypatch.setitem(weights, name, replace(weights[name], path=golden_file('t2t_vit_7'), **known))
    return lambda: re.findall(r'(\S+): in the package', caplog.text)


@pytest.mark.timm('1.0.31')
def test_tags_of_the_manifest_are_fetched_and_checked_by_us(fetched, tmp_path):
    from timm.models import resolve_model_input_args
    model = timm.create_model('t2t_vit_7', pretrained=True, **SMALL)
    timm.create_model('t2t_vit_7.in1k', pretrained=True, **SMALL)
    timm.create_model('t2t_vit_7', pretrained=True, pretrained_cfg='in1k', **SMALL)
    timm.create_model('t2t_vit_7', pretrained=True, pretrained_cfg_overlay=dict(crop_pct=1.0), **SMALL)
    timm.create_model('t2t_vit_14.in1k_ft_cifar10', pretrained=True, **SMALL, num_classes=7)
    # timm's scripts hand over the whole cfg of a tag
    timm.create_model(**resolve_model_input_args('t2t_vit_7.in1k', img_size=64), pretrained=True, **{
        k: v for k, v in SMALL.items() if k != 'img_size'})
    assert fetched() == ['t2t_vit_7.in1k'] * 4 + ['t2t_vit_14.in1k_ft_cifar10', 't2t_vit_7.in1k']
    assert model.pretrained_cfg.get('file') is None
    save_for_hf(model, tmp_path / 'saved', safe_serialization=True)
    assert str(tmp_path) not in (tmp_path / 'saved' / 'config.json').read_text()


@pytest.mark.parametrize('kwargs', [
    {}, dict(features_only=True), dict(features_only=True, feature_cls='getter', out_indices=1)])
def test_no_path_of_this_machine_stays_in_a_cfg(fetched, tmp_path, kwargs):
    model = timm.create_model('t2t_vit_7', pretrained=True, **SMALL, **kwargs)
    cfgs = [vars(m)['pretrained_cfg'] for m in model.modules() if 'pretrained_cfg' in vars(m)]
    assert cfgs and all(cfg.get('file') is None for cfg in cfgs)


def test_without_pretrained_nothing_is_fetched(fetched):
    timm.create_model('t2t_vit_7.in1k', **SMALL)
    assert fetched() == []


def test_sources_that_the_user_names_go_to_timm(fetched, golden_file, tmp_path):
    file = golden_file('t2t_vit_7')
    model = load('t2t_vit_7', file)
    timm.create_model('t2t_vit_7', pretrained=True, **SMALL, pretrained_cfg_overlay=dict(
        state_dict=model.state_dict()))
    cfg = dict(get_pretrained_cfg('t2t_vit_7.in1k').to_dict(), file=file)
    timm.create_model('t2t_vit_7', pretrained=True, pretrained_cfg=cfg, **SMALL)
    save_for_hf(model, tmp_path / 'dir', model_args=SMALL, safe_serialization=True)
    again = timm.create_model(f'local-dir:{tmp_path / "dir"}', pretrained=True)
    assert fetched() == []
    assert torch.equal(again.head.weight, model.head.weight)


@pytest.mark.slow
@pytest.mark.parametrize('asked, given', [('t2t_vit_7', 't2t_vit_10'), ('t2t_vit_7', 't2t_vit_t_14')])
def test_a_checkpoint_of_the_wrong_shape_names_what_it_looks_like(asked, given):
    state_dict = {k: torch.zeros(v.shape) for k, v in timm.create_model(given, device='meta').state_dict().items()}
    with pytest.raises(ValueError, match=f'This checkpoint looks like {given}, not like {asked}\\.'):
        timm.create_model(asked, pretrained=True, pretrained_cfg_overlay=dict(state_dict=state_dict))


def test_weights_of_timms_vit_are_told_before_their_positions():
    model = timm.create_model('test_t2t_vit')
    before = model.head.weight.clone()
    state_dict = dict(timm.create_model('test_vit').state_dict(), **{'head.weight': torch.ones(10, 64)})
    with pytest.raises(ValueError, match='is not a T2T-ViT: .* Nothing was loaded'):
        model.load_state_dict(state_dict)
    assert torch.equal(model.head.weight, before)


def test_a_model_of_ones_own_making_may_take_what_fits(golden_file):
    """pretrained_strict=False is timm's way to load part of a checkpoint."""
    file = golden_file('t2t_vit_7')
    model = load('t2t_vit_7', file, depth=1, pretrained_strict=False)
    assert torch.equal(model.blocks[0].attn.qkv.weight, load('t2t_vit_7', file).blocks[0].attn.qkv.weight)
