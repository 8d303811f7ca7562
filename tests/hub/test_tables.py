"""The table of tags, and where it says that weights would come from."""
import csv
import io
import json
import re
from dataclasses import replace

import huggingface_hub.constants
import pytest

from t2t_timm.hub.tables import models_csv, models_json, models_table, weights_origin
from t2t_timm.weights.manifest import load_manifest, weight_entry

NAME = 't2t_vit_14.in1k'
NOWHERE = 'nowhere: offline and in no cache'


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    for name in ('T2T_TIMM_HUB_NAMESPACE', 'T2T_TIMM_HUB_ONLY'):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize('known, cached, env, expected, offline', [
    (False, '', {}, 'the release', NOWHERE),
    (False, '', dict(HUB_ONLY='1'), 'nowhere: T2T_TIMM_HUB_ONLY, and no hash on the Hub is known', NOWHERE),
    (True, '', {}, f'the Hub (t2t-timm/{NAME}), then the release', NOWHERE),
    (True, '', dict(HUB_NAMESPACE='someone'), f'the Hub (someone/{NAME}), then the release', NOWHERE),
    (True, '', dict(HUB_NAMESPACE='someone', HUB_ONLY='1'), f'the Hub (someone/{NAME}) only', NOWHERE),
    (False, 'release', {}, 'the release downloaded before', 'the release downloaded before'),
    (True, 'release', {}, f'the Hub (t2t-timm/{NAME}), then the release downloaded before',
     'the release downloaded before'),
    (True, 'release', dict(HUB_ONLY='1'), f'the Hub (t2t-timm/{NAME}) only', NOWHERE),
    (False, 'hub', {}, 'the release', NOWHERE),  # whoever put it there
    (True, 'hub', {}, f'the Hub cache (t2t-timm/{NAME})', f'the Hub cache (t2t-timm/{NAME})'),
    (True, 'hub', dict(HUB_NAMESPACE='someone'), f'the Hub (someone/{NAME}), then the release', NOWHERE),
])
def test_origin(tmp_path, monkeypatch, known, cached, env, expected, offline):
    if known:
        entry = replace(weight_entry(NAME), hub=dict(sha256='0' * 64, size=9))
        monkeypatch.setitem(load_manifest()['weights'], NAME, entry)
    for path, content in {
            'release': {f'torch/hub/checkpoints/{weight_entry(NAME).file}': ''},
            'hub': {f'hub/models--t2t-timm--{NAME}/snapshots/{"a" * 40}/model.safetensors': '',
                    f'hub/models--t2t-timm--{NAME}/refs/main': 'a' * 40},
    }.get(cached, {}).items():
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).write_text(content)
    for key, value in env.items():
        monkeypatch.setenv(f'T2T_TIMM_{key}', value)
    assert weights_origin(NAME) == expected
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    assert weights_origin(NAME) == offline
    assert weights_origin('test_t2t_vit.mnist') == 'the package'


def test_table():
    header, *rows = (re.split('  +', row) for row in models_table().split('\n'))
    assert [row[0] for row in rows] == list(load_manifest()['weights'])
    assert rows[3] == [
        NAME, '21.47', '4.78', '86.2', '81.500', 'timm pull request 2426', "the authors' repository", 'the release']
    assert header[:3] == ['weights', 'params (M)', 'MACs (G)']


def test_csv_has_the_columns_of_timms_results():
    rows = list(csv.DictReader(io.StringIO(models_csv())))
    assert list(rows[0].values()) == [  # the best of all, whose top-5 nobody reported
        't2t_vit_24.tl_in1k', '84.200', '15.800', '', '', '64.00', '224', '0.9', 'bicubic']
    by_name = {row['model']: row for row in rows}
    assert by_name[NAME] == dict(
        model=NAME, top1='81.500', top1_err='18.500', top5='95.666', top5_err='4.334', param_count='21.47',
        img_size='224', crop_pct='0.9', interpolation='bicubic')
    assert list(by_name) == sorted(by_name, key=lambda name: -float(by_name[name]['top1']))
    assert set(by_name) == {name for name in load_manifest()['weights'] if '_ft_' not in name and 'in1k' in name}


def test_json_has_what_the_table_has():
    models = json.loads(models_json())
    for model, row in zip(models, models_table().split('\n')[1:], strict=True):
        name, params, macs, size, top1, reporter, source, origin = re.split('  +', row)
        assert [model['name'], model['reported_by'], model['source'], model['weights_from']] == [
            name, reporter, source, origin]
        assert (f'{model["params"] / 1e6:.2f}', f'{model["macs"] / 1e9:.2f}') == (params, macs)
        assert size.startswith('~') if model['size'] is None else f'{model["size"] / 1e6:.1f}' == size
        assert top1 == f'{model["top1"]:.3f}'
