"""publish and models --check, with the real client, against the loopback Hub and release host: all tags."""
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import Fault, Repo
from huggingface_hub.utils import WeakFileLock
from loopback import SMALL, Weights, ask, finish
from safetensors.torch import load

from t2t_timm.cli import main
from t2t_timm.hub.push import FILES
from t2t_timm.weights.manifest import MANIFEST, load_manifest, pretrained_cfg

NAMES = [name for name, entry in load_manifest()['weights'].items() if entry.url]
FILE = {name: load_manifest()['weights'][name].file for name in NAMES}
TOKEN = 'hf_loopback_secret'


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(scope='module')
def weights(hosts):
    """Small weights of every tag, as its publisher's release host has them."""
    weights = {}
    for i, name in enumerate(NAMES):
        weights[name] = Weights(i, name.split('.')[0], num_classes=pretrained_cfg(name)['num_classes'], **SMALL)
        hosts.release.files[f'/{FILE[name]}'] = weights[name].training_pickle
    return weights


@pytest.fixture(scope='module')
def stage(hosts, weights):
    """A function that makes a stage of a client that sees the small weights, and knows nothing of them or `known`."""
    def stage(*commands, known=None, env=None, **more):
        return dict(
            small=True, release=hosts.release.url, known=dict.fromkeys(NAMES, {}) | (known or {}),
            commands=commands, env=env or {}, **more)
    return stage


@pytest.fixture(scope='module')
def start_publisher(hosts, start_client, tmp_path_factory):
    """Start a client that is logged in, with caches of its own."""
    def start(*stages, **env):
        folder = tmp_path_factory.mktemp('publisher')
        return start_client(*stages, **dict(
            dict(HF_TOKEN=TOKEN, HF_HOME=str(folder / 'hf'), TORCH_HOME=str(folder / 'torch')), **env))
    return start


@pytest.fixture(scope='module')
def publish(start_publisher, tmp_path_factory):
    """A function that has one client carry out stages, the first with an empty torch cache, and returns the results."""
    publisher = start_publisher()

    def publish(first, *stages):
        env = dict(TORCH_HOME=str(tmp_path_factory.mktemp('torch')), HF_TOKEN=TOKEN)
        return ask(publisher, dict(first, env=env | first['env']), *stages)
    return publish


@pytest.fixture(scope='module')
def killed(hosts, stage, publish, start_publisher, tmp_path_factory):
    """Publish all tags, killed three times: as it downloads, as it uploads, as it reads back; then go on, and again."""
    folder = tmp_path_factory.mktemp('killed')
    manifest = Path(shutil.copy(MANIFEST, folder / 'manifest.yaml'))
    env = dict(TORCH_HOME=str(folder / 'torch'))
    command = ['publish', '--namespace', 'all', '--manifest', str(manifest)]
    resolve = f'/all/{NAMES[10]}/resolve/main/model.safetensors'
    lines = []
    for server, path, fault in (
            (hosts.release, f'/{FILE[NAMES[3]]}', Fault(stall=1000)),
            (hosts.hub, f'/api/models/all/{NAMES[6]}/commit/main', Fault(stall=0, methods=('POST',))),
            (hosts.hub, resolve, Fault(stall=0, methods=('HEAD',))),
    ):
        server.faults[path] = [fault]
        victim = start_publisher(stage(command), **env)
        assert server.stalled.acquire(timeout=100), victim.exitcode
        victim.kill()
        victim.join()
        lines.append(len(yaml.safe_load(manifest.read_text())['hub']))
        left = {p.name for p in (folder / 'torch' / 'hub' / 'checkpoints' / 't2t-timm-publish').iterdir()}
        assert len(left) == 1  # what the next run removes
    on, again = publish(stage(command, env=env), stage(command))
    return dict(
        folder=folder, manifest=manifest, lines=lines, on=on['commands'][0], again=again['commands'][0],
        requests=list(hosts.release.requests))


@pytest.mark.slow
def test_all_tags_killed_three_times(hosts, killed, weights):
    assert killed['lines'] == [3, 6, 10]
    on = killed['on']
    assert on['code'] == 0 and on['out'] == '', on['err']
    assert [line for line in on['log'] if line.startswith('[')] == [
        f'[{i} of 18] {name}' for i, name in enumerate(NAMES, 1)]
    assert on['log'][-1] == '18 tags: 10 already there, 8 published.'
    for name in NAMES:
        repo = hosts.hub.repos[f'all/{name}']
        assert repo.commits == 2  # the repo's own first commit and ours: none was sent twice
        assert {*FILES} <= {*repo.files}
        state_dict = load(repo.files['model.safetensors'])
        assert state_dict.keys() == weights[name].state_dict.keys()
        assert all(torch.equal(state_dict[k], v) for k, v in weights[name].state_dict.items())
        assert name in repo.files['README.md'].decode()
    downloads = [path for method, path, _, _ in killed['requests'] if method == 'GET']
    assert sorted(downloads) == sorted([f'/{FILE[name]}' for name in NAMES] + [f'/{FILE[NAMES[3]]}'])
    assert os.listdir(killed['folder'] / 'torch' / 'hub') == ['checkpoints']
    left = {p.name for p in (killed['folder'] / 'torch' / 'hub' / 'checkpoints').iterdir() if p.name[0] != '.'}
    assert left == {*FILE.values()}
    again = killed['again']
    assert again['code'] == 0 and again['log'][-1] == '18 tags: 18 already there.', again['err']
    assert len(again['log']) == 2 * 18 + 1


@pytest.mark.slow
def test_the_manifest_has_its_lines_and_is_otherwise_the_same(hosts, killed):
    expected = yaml.safe_load(MANIFEST.read_text(encoding='utf-8'))
    for name in NAMES:
        data = hosts.hub.repos[f'all/{name}'].files['model.safetensors']
        expected['hub'][name] = dict(sha256=sha256(data), size=len(data))
    text = killed['manifest'].read_text(encoding='utf-8')
    assert yaml.safe_load(text) == expected
    comments = [re.findall('#.*', t) for t in (MANIFEST.read_text(encoding='utf-8'), text)]
    assert comments[0] == comments[1] != []
    assert [p.name for p in killed['folder'].glob('*.yaml')] == ['manifest.yaml']


@pytest.mark.slow
def test_what_is_stale_is_published_again(hosts, killed, stage, publish, tmp_path):
    repo = hosts.hub.repos[f'all/{NAMES[0]}']
    card = repo.files['README.md']
    repo.files['README.md'] = b'of an older version'
    text = killed['manifest'].read_text()
    known = yaml.safe_load(text)['hub'][NAMES[2]]['sha256']
    manifest = tmp_path / 'manifest.yaml'
    manifest.write_text(text.replace(known, '0' * 64))
    result, = publish(stage(['publish', *NAMES[:3], '--namespace', 'all', '--manifest', str(manifest)]))
    command, = result['commands']
    assert command['code'] == 0 and command['log'][-1] == '3 tags: 2 published, 1 already there.', command['err']
    assert repo.files['README.md'] == card
    warnings = [line for line in command['log'] if 'the manifest expects other weights' in line]
    assert len(warnings) == 1 and f'{NAMES[2]}: the manifest expects other weights in all/{NAMES[2]}' in warnings[0]
    assert manifest.read_text() == text


@pytest.fixture(scope='module')
def failures(hosts, killed, stage, publish):
    """Five tags, of which one is good."""
    names = NAMES[:5]
    wrong_hash, gated, read_back, gone, _ = names
    converted = hosts.hub.repos[f'all/{read_back}'].files['model.safetensors']
    hosts.hub.repos[f'faulty/{gated}'] = Repo(gated=True)
    flipped = converted[:-1] + bytes([converted[-1] ^ 1])
    hosts.storage.faults[f'/{sha256(converted)}'] = [Fault(body=flipped)]
    released = hosts.release.files.pop(f'/{FILE[gone]}')
    result, = publish(stage(
        ['publish', *names, '--namespace', 'faulty'], known={wrong_hash: dict(sha256='0' * 64)}))
    hosts.release.files[f'/{FILE[gone]}'] = released
    return dict(command=result['commands'][0], names=names, flipped=sha256(flipped))


@pytest.mark.slow
def test_a_failure_stops_no_other(failures, hosts):
    command, names = failures['command'], failures['names']
    assert command['code'] == 1
    summary, *failed = command['log'][-1].splitlines()
    assert summary == '5 tags: 4 failed, 1 published.'
    for line, name, words in zip(failed, names[:4], (
            r'the sha256 of 71.7_T2T_ViT_7.pth.tar should be 0{64} but is \w{64}\. The file has been deleted',
            r'faulty/t2t_vit_10.in1k was uploaded, but model.safetensors could not be read back\. GatedRepoError.*403',
            r'faulty/t2t_vit_12.in1k was uploaded, but model.safetensors came back with the sha256 '
            rf'{failures["flipped"]} instead of \w{{64}}\. Publish it again',
            r'Downloading http://\S+ failed\. .*404',
    ), strict=True):
        assert re.match(f'  {name}: {words}', line), line
    assert 'Traceback' not in command['err']
    for name in (names[0], names[3]):  # nothing stands on the Hub that hides the release
        assert f'faulty/{name}' not in hosts.hub.repos


@pytest.mark.slow
def test_the_patch_has_what_was_published_and_applies(failures, hosts, tmp_path):
    file = tmp_path / 't2t_timm' / 'weights' / 'manifest.yaml'
    file.parent.mkdir(parents=True)
    shutil.copy(MANIFEST, file)
    subprocess.run(['git', 'apply', '-'], input=failures['command']['out'], cwd=tmp_path, text=True, check=True)
    before, after = (yaml.safe_load(path.read_text(encoding='utf-8')) for path in (MANIFEST, file))
    good = failures['names'][4]
    data = hosts.hub.repos[f'faulty/{good}'].files['model.safetensors']
    before['hub'][good] = dict(sha256=sha256(data), size=len(data))
    assert after == before


@pytest.mark.slow
def test_refusals_and_a_full_disk(hosts, killed, weights, stage, publish, tmp_path):
    name = NAMES[0]
    source = tmp_path / 'files'
    source.mkdir()
    (source / FILE[name]).write_bytes(weights[name].training_pickle)
    seen = len(hosts.release.requests)
    hosts.hub.faults['/api/whoami-v2'] = [Fault(status=401, methods=('GET',))]
    hosts.hub.faults['/api/repos/create'] = [Fault(status=403, methods=('POST',))]
    to = ['publish', name, '--namespace']
    manifest = shutil.copy(MANIFEST, tmp_path / 'manifest.yaml')
    none, bad, refused, full, healed, again, dry = [stage['commands'][0] for stage in publish(
        stage([*to, 'one'], env=dict(HF_TOKEN='')),
        stage([*to, 'one'], env=dict(HF_TOKEN=TOKEN)),
        stage([*to, 'one', '--from', str(source)]),
        stage([*to, 'one'], file_limit=100_000),
        stage([*to, 'one', '--from', str(source), '--manifest', str(manifest)]),
        stage([*to, 'one', '--from', str(source), '--manifest', str(manifest)]),
        stage([*to, 'two', '--from', str(source), '--dry-run'], env=dict(HF_TOKEN='')),
    )]
    log_in = r'Log in with `hf auth login`, or set HF_TOKEN, as someone who may write there\.\n'
    assert re.fullmatch(f't2t-timm publish: Publishing to one needs a Hub token\\. {log_in}', none['err'])
    assert re.fullmatch(rf't2t-timm publish: .* the one set is not accepted\. {log_in}', bad['err'])
    assert re.search(r'one/t2t_vit_7.in1k could not be uploaded\. .*403.*hf auth login', refused['log'][-1])
    assert re.search(r'Downloading http://\S+ failed\. OSError.*File too large', full['log'][-1])
    for command in (none, bad, refused, full):
        assert command['code'] == 1 and command['out'] == '' and 'Traceback' not in command['err']
    assert [path for _, path, _, _ in hosts.release.requests[seen:]] == [f'/{FILE[name]}']  # of the full disk
    assert healed['code'] == 0, healed['err']
    assert hosts.hub.repos[f'one/{name}'].files['model.safetensors'] == (
        hosts.hub.repos[f'all/{name}'].files['model.safetensors'])
    assert (source / FILE[name]).exists() and again['log'][-1] == '1 tag: 1 already there.'
    assert dry['code'] == 0 and dry['out'] == ''
    assert dry['log'][-1] == '1 tag: 1 checked, not sent.' and f'two/{name}' not in hosts.hub.repos


@pytest.mark.slow
def test_models_check_and_loading_by_tag(hosts, killed, weights, stage, publish):
    hub = yaml.safe_load(killed['manifest'].read_text())['hub']
    known = {name: dict(hub=lines) for name, lines in hub.items()}
    known_less = dict(known, **{NAMES[0]: dict(hub=dict(hub[NAMES[0]], sha256='0' * 64)), NAMES[1]: {}})
    hosts.hub.repos.update({f'other/{name}': hosts.hub.repos[f'all/{name}'] for name in NAMES[:3]})
    hosts.hub.repos['other/' + NAMES[3]] = Repo(gated=True)
    hosts.hub.repos['other/' + NAMES[4]] = Repo()
    hosts.hub.faults[f'/other/{NAMES[5]}/resolve/main/model.safetensors'] = [
        Fault(status=500, methods=('HEAD',), times=9)]
    seen = len(hosts.hub.requests)
    good, bad, loaded = publish(
        stage(['models', '--check'], known=known, env=dict(T2T_TIMM_HUB_NAMESPACE='all', HF_TOKEN='')),
        stage(['models', '--check'], known=known_less, env=dict(T2T_TIMM_HUB_NAMESPACE='other')),
        stage(
            cases=[dict(case=name, model=name, known=known[name]) for name in NAMES[::5]],
            env=dict(T2T_TIMM_HUB_NAMESPACE='all', T2T_TIMM_HUB_ONLY='1')))
    (good,), (bad,) = good['commands'], bad['commands']
    assert good['code'] == 0, good['out']
    assert [line.split() for line in good['out'].splitlines()[:-1]] == [[n, 'equal', f'all/{n}'] for n in NAMES]
    assert good['out'].splitlines()[-1] == '18 tags: 18 equal'
    assert bad['code'] == 1
    states = [line.split()[:2] for line in bad['out'].splitlines()[:-1]]
    assert states == [[name, state] for name, state in zip(
        NAMES, ['stale', 'unknown', 'equal', 'gated', 'missing', 'error'] + ['missing'] * 12, strict=True)]
    assert bad['out'].splitlines()[-1] == '18 tags: 1 stale, 1 unknown, 1 equal, 1 gated, 13 missing, 1 error'
    assert [path.split('/')[1] for method, path, _, _ in hosts.hub.requests[seen:][:36] if method == 'HEAD'] == (
        ['all'] * 18 + ['other'] * 18)
    for name, case in loaded['cases'].items():
        assert case.get('digest') == weights[name].digest, case


@pytest.mark.slow
def test_the_hub_cannot_be_reached(hosts, stage, start_publisher):
    seen = len(hosts.release.requests)
    result, = finish(start_publisher(
        stage(['models', '--check'], ['publish', '--namespace', 'x']), HF_ENDPOINT='http://127.0.0.1:9'))
    for command in result['commands']:
        assert command['code'] == 1 and command['out'] == ''
        assert re.search(
            r't2t-timm \w+: The Hub at http://127.0.0.1:9 cannot be reached\. Connect.*\n$', command['err'])
    assert len(hosts.release.requests) == seen


@pytest.mark.slow
def test_no_output_holds_the_token(failures, killed):
    for command in (failures['command'], killed['on'], killed['again']):
        assert TOKEN not in str(command)


@pytest.mark.parametrize('args, words', [
    (['t2t_vit_14'], 'No tag with a release is called t2t_vit_14; there are t2t_vit_7.in1k, '),
    (['test_t2t_vit.mnist'], 'No tag with a release is called test_t2t_vit.mnist'),
    (['--namespace', 'a/b'], "Repo id must be in the form 'repo_name' or 'namespace/repo_name': 'a/b/t2t_vit_7.in1k'"),
    (['--manifest', 'nowhere.yaml'], 'nowhere.yaml: No such file or directory.'),
    (['--manifest', __file__], 'is not a manifest: it should be a copy of t2t_timm/weights/manifest.yaml'),
    ([], 'the one set holds characters that no token has. Log in with'),
])
def test_mistakes_are_found_before_anything_is_done(args, words, capsys, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_sec\x01ret')
    monkeypatch.setattr('t2t_timm.hub.publish.get_cache_dir', lambda: pytest.fail('it went on'))
    assert main(['publish', *args]) == 1
    out, err = capsys.readouterr()
    assert out == '' and words in err and len(err.splitlines()) == 1 and 'ret' not in err


def test_a_folder_without_the_file_and_one_publisher_at_a_time(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr('t2t_timm.hub.publish.get_cache_dir', lambda: tmp_path)
    dry = ['publish', 't2t_vit_7.in1k', '--dry-run', '--from', str(tmp_path)]
    assert main(dry) == 1
    assert f'{tmp_path} does not hold 71.7_T2T_ViT_7.pth.tar, which is at https://' in capsys.readouterr().err
    assert not (tmp_path / 't2t-timm-publish').exists()
    with WeakFileLock(tmp_path / '.t2t-timm-publish.lock'):
        assert main(dry) == 1
    assert 'Another command is writing to ' in capsys.readouterr().err
