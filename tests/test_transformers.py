"""Transformers loads the models through its timm wrapper: converted directories, backbones, and a step of training."""
import json
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
import warm
from PIL import Image

from t2t_timm.cli import main
from t2t_timm.commands.classify import class_names
from t2t_timm.hub.convert import convert

transformers = pytest.importorskip('transformers', reason='pip install transformers')


def test_logits_are_timms(embedded_folder):
    photo = Image.linear_gradient('L').convert('RGB').rotate(30).resize((110, 90))
    model = transformers.AutoModelForImageClassification.from_pretrained(embedded_folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(embedded_folder)
    expected = timm.create_model(f'local-dir:{embedded_folder}', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(expected), is_training=False)
    with torch.no_grad():
        inputs = processor(photo, return_tensors='pt')
        torch.testing.assert_close(inputs['pixel_values'], transform(photo).unsqueeze(0))
        logits = expected(transform(photo).unsqueeze(0))
        torch.testing.assert_close(model(**inputs).logits, logits, atol=1e-6, rtol=0)
    answer = transformers.pipeline('image-classification', model=embedded_folder)(photo)
    best = logits.softmax(dim=-1).max().item()
    assert answer[0]['score'] == pytest.approx(best, rel=1e-5)
    assert answer[0]['label'] == model.config.id2label[logits.argmax().item()]


def test_features_without_a_classifier(embedded_folder):
    model = transformers.AutoModel.from_pretrained(embedded_folder).eval()
    x = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = timm.create_model('test_t2t_vit', pretrained=True).eval().forward_features(x)
        torch.testing.assert_close(model(pixel_values=x).last_hidden_state, expected)


def test_nothing_but_transformers_is_imported(embedded_folder):
    code = (
        'import sys, torch\n'
        'from transformers import AutoModelForImageClassification\n'
        'assert "timm" not in sys.modules and "t2t_timm" not in sys.modules\n'
        'model = AutoModelForImageClassification.from_pretrained(sys.argv[1])\n'
        'print(type(model.timm_model).__name__, model(torch.zeros(1, 3, 56, 56)).logits.shape[-1])\n'
        'from transformers import TimmBackbone\n'
        'print(type(TimmBackbone.from_pretrained("test_t2t_vit")._backbone).__name__)\n'
    )
    done = warm.run(code, embedded_folder)
    assert not done.returncode, done.stderr
    assert done.stdout.split() == ['T2TViT', '10', 'T2TFeaturePyramid']


@pytest.mark.parametrize('source', ['test_t2t_vit', 'local-dir'])
@pytest.mark.parametrize('auto, out_indices', [(False, (0, 2)), (True, (0, 1, 2))])
def test_pretrained_backbone(embedded_folder, monkeypatch, source, auto, out_indices):
    backbone_cls, kwargs = transformers.TimmBackbone, {}
    if auto:  # asks the Hub, whatever the name, whether there is a repo of that name: there is none
        backbone_cls, kwargs = transformers.AutoBackbone, {'use_timm_backbone': True}
        monkeypatch.setattr(
            'transformers.models.auto.auto_factory.hf_api', lambda: SimpleNamespace(repo_exists=lambda name: False))
    name = source if source == 'test_t2t_vit' else f'local-dir:{embedded_folder}'
    backbone = backbone_cls.from_pretrained(name, out_indices=out_indices, **kwargs).eval()
    pyramid = timm.create_model(name, pretrained=True, features_only=True, out_indices=out_indices).eval()
    assert list(backbone.channels) == [64] * len(out_indices)
    x = torch.randn(1, 3, *pyramid.model.patch_embed.img_size)
    with torch.no_grad():
        for got, expected in zip(backbone(x).feature_maps, pyramid(x), strict=True):
            torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@pytest.fixture(scope='module')
def saved(embedded_folder, tmp_path_factory):
    """Directory that Transformers saves of the embedded model."""
    folder = tmp_path_factory.mktemp('saved') / 'model'
    transformers.AutoModelForImageClassification.from_pretrained(embedded_folder).save_pretrained(folder)
    return folder


def test_timm_loads_what_transformers_saves(embedded_folder, saved):
    model = timm.create_model(f'local-dir:{saved}', pretrained=True)
    expected = timm.create_model(f'local-dir:{embedded_folder}', pretrained=True)
    assert model.pretrained_cfg['label_names'] == expected.pretrained_cfg['label_names']
    for (name, p), (other, q) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert name == other and torch.equal(p, q)


@pytest.mark.parametrize('command', ['classify', 'verify'])
def test_the_null_of_other_configs_is_named_with_its_cure(saved, tmp_path, capsys, command):
    folder = shutil.copytree(saved, tmp_path / 'model')
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps(dict(config, model_args=None)))
    Image.new('RGB', (9, 9)).save(tmp_path / 'a.png')
    argv = ['verify', str(folder)] if command == 'verify' else [
        'classify', str(tmp_path / 'a.png'), '--model', f'local-dir:{folder}']
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert 'its config.json has "model_args": null, as Transformers saves it' in out + err
    assert 'put {} for null' in out + err
    (folder / 'config.json').write_text(json.dumps(dict(config, model_args={})))
    assert main(argv) == 0


def test_labels_of_before_a_fine_tuning_are_not_taken(embedded_folder, tmp_path, caplog):
    caplog.set_level('INFO')
    model = transformers.AutoModelForImageClassification.from_pretrained(
        embedded_folder, num_labels=3, ignore_mismatched_sizes=True)
    model.save_pretrained(tmp_path / 'tuned')
    assert class_names(timm.create_model(f'local-dir:{tmp_path / "tuned"}', pretrained=True)) == [
        'class 0', 'class 1', 'class 2']
    out = convert(tmp_path / 'tuned' / 'model.safetensors', 'test_t2t_vit', tmp_path / 'out')
    assert 'label_names' not in json.loads((out / 'config.json').read_text())
    assert 'The classes have no names: --labels FOLDER|FILE gives them.' in caplog.messages
    assert list(transformers.AutoConfig.from_pretrained(out).id2label.values()) == ['LABEL_0', 'LABEL_1', 'LABEL_2']
