"""The recipes, against the argument names of timm's train.py.

tests/data/train_args.json holds those names, written in a checkout of pytorch-image-models by

    python -c "import json, train; print(json.dumps(sorted(a.dest for a in train.parser._actions), indent=0))"
"""
import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import resolve_data_config
from timm.data.auto_augment import rand_augment_transform
from timm.optim import create_optimizer_v2

from t2t_timm.cli import main
from t2t_timm.errors import UserError
from t2t_timm.recipes import recipe_names, recipe_path
from t2t_timm.weights.manifest import load_manifest

ARGS = json.loads((Path(__file__).parent / 'data' / 'train_args.json').read_text())
IMAGENET = sorted({name.split('.')[0] for name in load_manifest()['weights'] if name.endswith('.in1k')})
STUDIES = [
    't2t_vit_14_resnext', 't2t_vit_14_se', 't2t_vit_14_wide', 't2t_vit_16_ghost', 't2t_vit_c_14', 't2t_vit_dense']
CIFAR = [f't2t_vit_{n}_cifar{c}' for n in (14, 19) for c in (10, 100)]


def load(name):
    return yaml.safe_load(Path(recipe_path(name)).read_text(encoding='utf-8'))


@pytest.fixture(scope='module')
def train_script(timm_scripts):
    return SimpleNamespace(**runpy.run_path(str(timm_scripts / 'train.py'), run_name='timm_train'))


def test_the_architectures():
    assert len(IMAGENET) == 10  # 7, 10, 12, 14, 19, 24, 14_384, t_14, t_19, t_24
    ours = timm.list_models(['t2t_vit*', 'test_t2t_vit'])
    assert sorted(IMAGENET + STUDIES + ['test_t2t_vit']) == sorted(ours)
    assert recipe_names() == sorted(IMAGENET + STUDIES + CIFAR + ['t2t_vit_14_384_ft', 'test_t2t_vit_mnist'])


@pytest.mark.parametrize('name', recipe_names())
def test_names_and_values(name):
    recipe = load(name)
    assert not set(recipe) - set(ARGS)
    assert recipe['model'] in timm.list_models()
    for value in recipe.values():  # YAML reads 1e-3 as text
        if isinstance(value, str):
            with pytest.raises(ValueError):
                float(value)


@pytest.mark.parametrize('name', recipe_names())
def test_train_script_parses(name, train_script, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py', '--config', recipe_path(name), '--data-dir', 'images'])
    defaults = {action.dest: action.type for action in train_script.parser._actions}
    monkeypatch.setattr(train_script.parser, '_defaults', {})  # _parse_args sets defaults for good
    args = vars(train_script._parse_args()[0])
    recipe = load(name)
    assert set(args) | {'help'} == set(defaults)  # an unknown key would be one more
    assert {key: args[key] for key in recipe} == recipe
    for key, value in recipe.items():
        if defaults[key] in (int, float) and not isinstance(value, list):
            assert defaults[key](value) == value


@pytest.mark.parametrize('name', IMAGENET + STUDIES)
def test_official_recipe(name):
    recipe = load(name)
    assert recipe['model'] == name
    lite = name in ('t2t_vit_7', 't2t_vit_10', 't2t_vit_12')
    large = name.rsplit('_', 1)[1] in ('19', '24')
    # at the published global batch the rate is the published one, and it is linear in the batch
    assert recipe['lr_base'] * 8 * recipe['batch_size'] / recipe['lr_base_size'] == (1e-3 if lite else 5e-4)
    assert recipe['lr_base_scale'] == 'linear' and 'lr' not in recipe
    assert recipe['weight_decay'] == (0.03 if lite else 0.065 if large else 0.05)
    assert (recipe['epochs'], recipe['warmup_epochs'], recipe['cooldown_epochs']) == (300, 10, 10)


@pytest.mark.parametrize('name', recipe_names())
def test_header(name):
    header = [line for line in Path(recipe_path(name)).read_text(encoding='utf-8').splitlines() if line[0] == '#']
    text = ' '.join(line.lstrip('# ') for line in header)
    recipe = load(name)
    assert 'Source: ' in text and f"Global batch {recipe.get('lr_base_size', recipe['batch_size'])}" in text
    if 'lr_base' in recipe:
        stated = re.search(r': 1 GPU (\S+), 8 GPUs (\S+), 64 GPUs (\S+), at 64 a GPU', text).groups()
        for gpus, rate in zip((1, 8, 64), stated, strict=True):
            assert float(rate) == pytest.approx(recipe['lr_base'] * gpus * 64 / recipe['lr_base_size'])


@pytest.mark.parametrize('name', recipe_names())
def test_model_takes_what_the_loader_gives(name):
    recipe = load(name)
    with torch.device('meta'):
        model = timm.create_model(
            recipe['model'], num_classes=recipe.get('num_classes'), **recipe.get('model_kwargs', {}))
    assert resolve_data_config(recipe, model=model)['input_size'] == (3, *model.patch_embed.img_size)


@pytest.mark.parametrize('policy', sorted({load(name)['aa'] for name in recipe_names() if 'aa' in load(name)}))
def test_augmentation_holds_at_its_strongest(policy, monkeypatch):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (32, 32, 3), dtype=np.uint8))
    operations = rand_augment_transform(policy, {}).ops
    assert len(operations) >= 14
    monkeypatch.setattr('random.gauss', lambda mean, std: mean + 6 * std)
    for operation in operations:
        operation.prob = 1
        assert operation(image).size == image.size


@pytest.mark.parametrize('name', CIFAR)
def test_cifar_backbone_learns_at_a_hundredth(name):
    recipe = load(name)
    model = timm.create_model(recipe['model'], num_classes=recipe['num_classes'], device='meta')
    optimizer = create_optimizer_v2(
        model, opt=recipe['opt'], lr=0.05, weight_decay=recipe['weight_decay'], momentum=recipe['momentum'],
        layer_decay=recipe['layer_decay'], layer_decay_min_scale=recipe['layer_decay_min_scale'])
    scales = {id(p): group['lr_scale'] for group in optimizer.param_groups for p in group['params']}
    for key, param in model.named_parameters():
        assert scales[id(param)] == (1 if key.startswith('head.') else 0.01), key


def test_command(capsys):
    assert main(['recipe', 't2t_vit_14']) == 0
    assert capsys.readouterr().out.strip() == recipe_path('t2t_vit_14')
    assert main(['recipe']) == 0
    assert capsys.readouterr().out.split() == recipe_names()
    assert main(['recipe', 't2t_vit_15']) == 1
    assert "No recipe named 't2t_vit_15'; there are" in capsys.readouterr().err
    with pytest.raises(UserError):
        recipe_path('../hub/manifest')
