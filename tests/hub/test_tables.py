"""The table of tags, and where it says that weights would come from."""
import huggingface_hub.constants
import pytest

from t2t_timm.hub.tables import models_table, weights_origin
from t2t_timm.weights.manifest import load_manifest, weight_entry

NAME = 't2t_vit_14.in1k'


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    for name in ('T2T_TIMM_HUB_NAMESPACE', 'T2T_TIMM_HUB_ONLY'):
        monkeypatch.delenv(name, raising=False)


def cache_on_hub(root, repo):
    folder = root / 'hub' / f'models--{repo.replace("/", "--")}'
    snapshot = folder / 'snapshots' / ('a' * 40)
    snapshot.mkdir(parents=True)
    (snapshot / 'model.safetensors').write_bytes(b'')
    (folder / 'refs').mkdir()
    (folder / 'refs' / 'main').write_text('a' * 40)


def cache_release(root):
    file = root / 'torch' / 'hub' / 'checkpoints' / weight_entry(NAME)['file']
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b'')


def test_origin_without_caches(monkeypatch):
    assert weights_origin('test_t2t_vit.mnist') == 'the package'
    assert weights_origin(NAME) == f'the Hub (t2t-timm/{NAME}), then the release'
    monkeypatch.setenv('T2T_TIMM_HUB_NAMESPACE', 'someone')
    assert weights_origin(NAME) == f'the Hub (someone/{NAME}), then the release'
    monkeypatch.setenv('T2T_TIMM_HUB_ONLY', '1')
    assert weights_origin(NAME) == f'the Hub (someone/{NAME}) only'
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    assert weights_origin(NAME) == 'nowhere: offline and in no cache'


def test_origin_with_the_release_downloaded(tmp_path, monkeypatch):
    cache_release(tmp_path)
    assert weights_origin(NAME) == f'the Hub (t2t-timm/{NAME}), then the release downloaded before'
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    assert weights_origin(NAME) == 'the release downloaded before'
    monkeypatch.setenv('T2T_TIMM_HUB_ONLY', '1')
    assert weights_origin(NAME) == 'nowhere: offline and in no cache'


def test_origin_in_the_hub_cache(tmp_path, monkeypatch):
    cache_on_hub(tmp_path, f't2t-timm/{NAME}')
    assert weights_origin(NAME) == f'the Hub cache (t2t-timm/{NAME})'
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    assert weights_origin(NAME) == f'the Hub cache (t2t-timm/{NAME})'
    monkeypatch.setenv('T2T_TIMM_HUB_NAMESPACE', 'someone')
    assert weights_origin(NAME) == 'nowhere: offline and in no cache'


def test_table():
    header, *rows = models_table().split('\n')
    assert [row.split()[0] for row in rows] == list(load_manifest()['weights'])
    row = dict(zip(('name', 'params', 'macs', 'size', 'top1', 'reporter', 'source'), rows[3].split(), strict=False))
    assert row == dict(name=NAME, params='21.47', macs='4.78', size='86.2', top1='81.500', reporter='timm_pull_2426',
                       source='yitu')
    assert header.split()[:3] == ['weights', 'params', '(M)']
