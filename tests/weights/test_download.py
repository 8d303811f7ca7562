"""Where weights come from and what happens when something goes wrong on the way; the real client, loopback hosts."""
import hashlib
import logging
import pickle
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import published
import pytest
from hub_server import Fault, Repo
from loopback import BIG, TINY, Weights, ask, finish

from t2t_timm.weights.download import DownloadError, pretrained_file
from t2t_timm.weights.manifest import load_manifest, pretrained_cfg, weight_entry

ALWAYS = 1000  # times that a fault happens
DROP = 12 << 20  # the client writes in pieces of 10 MB: a drop there leaves one piece to go on from


@dataclass(frozen=True)
class Case:
    """A load: what the hosts hold and do wrong, and what comes of it."""
    model: str
    error: tuple[str, str] | None = None  # its type and message, or the published weights are loaded
    healed: bool = False  # after the error the hosts are healed, and the same process loads the published weights
    hub: bool = True  # the Hub has a repo; if not, the publisher's release is all there is
    known: tuple[str, ...] = ()  # what the manifest knows of the file
    big: bool = False
    cache: bool = True  # a cache of its own
    empty: bool = False  # the repo has no weights in it
    gated: bool = False
    flipped: bool = False  # the bytes that come are others
    fault: dict[str, Any] | None = None  # of the host that holds the file


HUB = dict(
    found=Case('t2t_vit_7.in1k', known=('size', 'sha256'), cache=False),
    found_unknown=Case('t2t_vit_10.in1k'),
    file_missing=Case('t2t_vit_12.in1k', empty=True, error=(
        'DownloadError', r'Downloading one/.* failed. .*Entry Not Found for url: .*one/t2t_vit_12.in1k/.*safetensors')),
    gated=Case('t2t_vit_14.in1k', gated=True, error=(
        'DownloadError', r'Downloading one/t2t_vit_14.in1k from the Hub failed. GatedRepoError: 403')),
    head_503_once=Case('t2t_vit_19.in1k', fault=dict(status=503, methods=('HEAD',))),
    get_503_once=Case('t2t_vit_24.in1k', fault=dict(status=503)),
    get_503_always=Case('t2t_vit_24.tl_in1k', fault=dict(status=503, times=ALWAYS), healed=True, error=(
        'DownloadError', r'Downloading one/t2t_vit_24.tl_in1k from the Hub failed. .*503')),
    short_once=Case('t2t_vit_14_384.in1k', fault=dict(short=1000)),
    short_always=Case('t2t_vit_14.in1k_ft_cifar10', fault=dict(short=1000, times=ALWAYS), healed=True, error=(
        'DownloadError', r'Downloading one/.* failed. .*should be of size \d+ but has size 1000')),
    dropped=Case('t2t_vit_19.in1k_ft_cifar10', big=True, known=('size', 'sha256'), fault=dict(drop=DROP)),
    wrong_bytes=Case(
        't2t_vit_14.in1k_ft_cifar100', known=('size', 'sha256'), flipped=True, fault=dict(times=ALWAYS), healed=True,
        error=(
            'IntegrityError', r'the sha256 of model.safetensors should be [0-9a-f]{64} but is \w{64}\. .*deleted')),
    wrong_bytes_unknown=Case(
        't2t_vit_19.in1k_ft_cifar100', flipped=True, fault=dict(times=ALWAYS), healed=True, error=(
            'IntegrityError', r'the sha256 of model.safetensors should be [0-9a-f]{64} but is \w{64}')),
)

RELEASE = dict(
    release=Case('t2t_vit_7.in1k', hub=False, cache=False),
    release_503_once=Case('t2t_vit_10.in1k', hub=False, fault=dict(status=503)),
    release_503_always=Case('t2t_vit_12.in1k', hub=False, fault=dict(status=503, times=ALWAYS), healed=True, error=(
        'DownloadError', r'Downloading http://\S+/release_503_always.pth.tar failed. .*503')),
    release_dropped=Case('t2t_vit_14.in1k', hub=False, big=True, known=('size', 'sha384'), fault=dict(drop=DROP)),
    release_wrong=Case(
        't2t_vit_19.in1k', hub=False, known=('sha256_prefix',), flipped=True, fault=dict(times=ALWAYS), healed=True,
        error=(
            'IntegrityError', r'the sha256_prefix of \S+ should be [0-9a-f]{8} but is [0-9a-f]{8}\. .*deleted')),
    release_short=Case('t2t_vit_24.in1k', hub=False, fault=dict(short=100_000, times=ALWAYS), healed=True, error=(
        'IntegrityError', r'release_short.pth.tar is not a readable PyTorch checkpoint, or it is cut short.* deleted')),
    release_gateway=Case(
        't2t_vit_24.tl_in1k', hub=False, fault=dict(body=b'<html>Please log in</html>', times=ALWAYS), healed=True,
        error=('IntegrityError', r"release_gateway.pth.tar begins with b'<html>Pl': it is not a checkpoint.* deleted")),
    release_exploit=Case('t2t_vit_14_384.in1k', hub=False, error=(
        'IntegrityError', r'posix.system, which is not a numpy array.* deleted')),
    release_404=Case(
        't2t_vit_14.in1k_ft_cifar10', hub=False, fault=dict(status=404, times=ALWAYS), healed=True, error=(
            'DownloadError', r'Downloading http://\S+/release_404.pth.tar failed. .*404')),
)

KILLED = dict(  # two by a first process, which is killed; then all by a second
    killed=Case('t2t_vit_7.in1k', big=True, fault=dict(stall=DROP)),
    release_killed=Case('t2t_vit_14.in1k', hub=False, big=True, known=('sha256',), fault=dict(stall=DROP)),
    head_503_always=Case('t2t_vit_10.in1k', fault=dict(status=503, methods=('HEAD',), times=ALWAYS), error=(
        'DownloadError', r'could not be reached for three/t2t_vit_10.in1k, and the file is not in the cache.*503')),
    release_overfull=Case('t2t_vit_12.in1k', hub=False, known=('sha256',)),  # a beginning that is none lies there
)

BOTH = dict(  # by two processes at once
    both=Case('t2t_vit_7.in1k', big=True, known=('size', 'sha256')),
    release_both=Case('t2t_vit_10.in1k', hub=False, big=True),
)

UNREACHABLE = dict(
    no_network=Case('t2t_vit_7.in1k', error=(
        'DownloadError', r'could not be reached for five/t2t_vit_7.in1k, and the file is not in the cache. Connect')),
)

NO_RELEASE = dict(
    no_network_release=Case('t2t_vit_10.in1k', hub=False, error=(
        'DownloadError', r'Downloading http://127.0.0.1:9/x failed. Connect')),
)

AGAIN = dict(  # cases from above, under other circumstances
    hub_only=replace(RELEASE['release'], error=(
        'DownloadError', r'There is no Hub repo two/t2t_vit_7.in1k, and T2T_TIMM_HUB_ONLY forbids')),
    offline_cached=HUB['found'],
    offline_empty=replace(HUB['found'], error=(
        'DownloadError', r'Offline mode is on \(HF_HUB_OFFLINE=1\), and the file is not in the cache\.$')),
    offline_release_cached=RELEASE['release'],
)

CASES = {**HUB, **RELEASE, **KILLED, **UNREACHABLE, **NO_RELEASE, **AGAIN}
HEALED = [name for name, case in CASES.items() if case.healed]
FAILING = [name for name, case in CASES.items() if case.error]
SUCCEEDING = [name for name, case in CASES.items() if not case.error]
SUCCEEDING += [f'{name}, later' for name in HEALED] + [f'{name}, process {i}' for name in BOTH for i in (0, 1)]


class Plan:
    """Cases of one process, laid out on the hosts."""

    def __init__(self, hosts, folder: Path, namespace: str, cases: dict[str, Case]) -> None:
        self.hosts, self.folder, self.namespace = hosts, folder, namespace
        self.cases, self.weights, self.faults = {}, {}, {}
        for name, case in cases.items():
            self.add(name, case)

    def add(self, name: str, case: Case) -> None:
        kwargs = BIG if case.big else TINY
        weights = Weights(len(self.weights) + 1, 't2t_vit_7', **kwargs)
        repo, file = f'{self.namespace}/{case.model}', f'/{name}.pth.tar'
        data = weights.safetensors if case.hub else weights.pickle
        sha256 = hashlib.sha256(data).hexdigest()
        facts = dict(
            size=len(data), sha256=sha256, sha384=hashlib.sha384(data).hexdigest(), sha256_prefix=sha256[:8])
        path, server = (f'/{sha256}', self.hosts.storage) if case.hub else (file, self.hosts.release)
        if case.hub:
            self.hosts.hub.repos[repo] = Repo({} if case.empty else {'model.safetensors': data}, gated=case.gated)
        self.hosts.release.files[file] = weights.pickle
        if case.fault is not None:
            if 'HEAD' in case.fault.get('methods', ()):
                path, server = f'/{repo}/resolve/main/model.safetensors', self.hosts.hub
            body = dict(body=data[:-1] + bytes([data[-1] ^ 1])) if case.flipped else {}
            self.faults[name] = Fault(**case.fault, **body)
            server.faults[path] = [self.faults[name]]
        known = {fact: facts[fact] for fact in case.known}
        self.weights[name] = weights
        self.cases[name] = dict(
            case=name, model=case.model, kwargs=kwargs,
            known=dict(dict(hub=known) if case.hub and known else known, url=self.hosts.release.url + file,
                       file=f'{name}.pth.tar'),
            cache_dir=str(self.folder / name) if case.cache else None,
        )

    def stage(self, only=None, **stage):
        stage.setdefault('env', {}).setdefault('T2T_TIMM_HUB_NAMESPACE', self.namespace)
        return dict(stage, cases=[case for name, case in self.cases.items() if only is None or name in only])


@pytest.fixture(scope='module')
def outcomes(hosts, start_client, tmp_path_factory):
    """Run every case, several processes at a time; return what came of each, by case."""
    folder = tmp_path_factory.mktemp('caches')
    hub, release = Plan(hosts, folder, 'one', HUB), Plan(hosts, folder, 'two', RELEASE)
    killed, both = Plan(hosts, folder, 'three', KILLED), Plan(hosts, folder, 'four', BOTH)
    unreachable, no_release = Plan(hosts, folder, 'five', UNREACHABLE), Plan(hosts, folder, 'six', NO_RELEASE)
    no_release.cases['no_network_release']['known']['url'] = 'http://127.0.0.1:9/x'
    # as GitHub does, the publisher sends the client on to a storage host
    hosts.storage.files['/moved'] = release.weights['release'].training_pickle
    hosts.release.redirects['/release.pth.tar'] = f'{hosts.storage.url}/moved'
    hosts.release.files['/release_exploit.pth.tar'] = pickle.dumps(
        dict(state_dict=published.Evil(f'touch {folder}/executed')), protocol=2)
    (folder / 'release_overfull').mkdir()
    (folder / 'release_overfull' / 'release_overfull.pth.tar.incomplete').write_bytes(
        killed.weights['release_overfull'].pickle + b'more')
    hub_only = dict(release.cases['release'], case='hub_only', cache_dir=str(folder / 'hub_only'))

    victim = start_client(killed.stage(['killed', 'release_killed']))
    lonely = start_client(
        unreachable.stage(), no_release.stage(env=dict(T2T_TIMM_HUB_NAMESPACE='')), HF_ENDPOINT='http://127.0.0.1:9')
    main = start_client()
    stages = ask(
        main,
        hub.stage(),
        # alone: timm allows argparse.Namespace for all threads, and forbids it again for all
        release.stage(['release']),
        release.stage(set(RELEASE) - {'release'}),
        dict(cases=[hub_only], env=dict(T2T_TIMM_HUB_ONLY='1')),
    )
    assert hosts.storage.stalled.acquire(timeout=60) and hosts.release.stalled.acquire(timeout=60)
    part = folder / 'release_killed' / 'release_killed.pth.tar.incomplete'
    while part.stat().st_size < 10 << 20:
        time.sleep(0.02)
    victim.kill()
    victim.join()
    after_kill = {
        case: {p.name for p in (folder / case).rglob('*') if p.is_file()} for case in ('killed', 'release_killed')}
    again = start_client(killed.stage(), both.stage(barrier=str(folder / 'barrier')))

    for name in HEALED:
        (hub.faults | release.faults)[name].times = 0
    release_later, hub_later, twin = ask(
        main, release.stage(HEALED, env=dict(T2T_TIMM_HUB_ONLY='0')), hub.stage(HEALED),
        both.stage(barrier=str(folder / 'barrier')))
    cached = dict(hub.cases['found'], case='offline_cached')
    empty = dict(cached, case='offline_empty', cache_dir=str(folder / 'offline_empty'))
    release_cached = dict(release.cases['release'], case='offline_release_cached')
    offline = start_client(
        dict(cases=[cached, empty], env=dict(T2T_TIMM_HUB_NAMESPACE='one')),
        dict(cases=[release_cached], env=dict(T2T_TIMM_HUB_NAMESPACE='two')),
        HF_HUB_OFFLINE='1')

    rerun, other_twin = finish(again)
    result = {}
    for stage in (*stages, rerun, *finish(lonely), *finish(offline)):
        result.update(stage['cases'])
    for suffix, stage in (
            ('later', release_later), ('later', hub_later), ('process 0', twin), ('process 1', other_twin)):
        result.update({f'{case}, {suffix}': r for case, r in stage['cases'].items()})

    weights = {**hub.weights, **release.weights, **killed.weights, **both.weights}
    weights.update({f'offline_{k}': weights[v] for k, v in (('cached', 'found'), ('release_cached', 'release'))})
    for case, r in result.items():
        r['expected_digest'] = weights[case.split(',')[0]].digest if r['ok'] else None
    return dict(result, after_kill=after_kill, executed=(folder / 'executed').exists())


NAME = 't2t_vit_14.in1k'


@pytest.mark.parametrize('namespace, known, repo', [
    ('', {}, None),
    ('', dict(size=9), None),
    ('', dict(size=9, sha256='0' * 64), f't2t-timm/{NAME}'),
    ('acme', {}, f'acme/{NAME}'),
    ('t2t-timm', {}, f't2t-timm/{NAME}'),  # who names it trusts it
])
def test_our_own_namespace_is_asked_only_for_what_the_manifest_knows(
        monkeypatch, caplog, tmp_path, namespace, known, repo):
    caplog.set_level(logging.INFO)
    monkeypatch.setitem(load_manifest()['weights'], NAME, replace(weight_entry(NAME), hub=known))
    monkeypatch.setenv('T2T_TIMM_HUB_NAMESPACE', namespace)
    advice = f'^{NAME} could not be downloaded. What you can do: .* copy it to {tmp_path}/81.5_T2T_ViT_14.pth.tar, or'
    with pytest.raises(DownloadError, match=f'{advice}.* Offline mode is on .*and the file is not in the cache') as e:
        pretrained_file(NAME, tmp_path)
    assert 'reached' not in str(e.value) and str(e.value).lower().count('offline mode') == 1
    assert re.findall('asking the Hub for (.*).$', caplog.text, re.MULTILINE) == [repo] * (repo is not None)
    assert pretrained_cfg(NAME)['hf_hub_id'] == repo  # what timm would ask


def test_the_hub_alone_and_no_hash(monkeypatch):
    monkeypatch.setenv('T2T_TIMM_HUB_ONLY', '1')
    with pytest.raises(DownloadError, match=(
            f"^{NAME} could not be downloaded. What you can do: .* T2T_TIMM_HUB_ONLY forbids the publisher's release, "
            f'and t2t-timm/{NAME} is not asked, as the manifest knows no hash of its weights.$')):
        pretrained_file(NAME)


@pytest.mark.slow
@pytest.mark.parametrize('case', SUCCEEDING)
def test_loads_the_published_weights(outcomes, case):
    outcome = outcomes[case]
    assert outcome['ok'], outcome
    assert outcome['digest'] == outcome['expected_digest']
    assert outcome['cfg_file'] is None  # no path of this machine in what is saved and published


@pytest.mark.slow
@pytest.mark.parametrize('case', FAILING)
def test_fails_with_one_clear_error_and_leaves_nothing_to_load(outcomes, case):
    error, message = CASES[case].error
    outcome = outcomes[case]
    assert not outcome['ok']
    assert outcome['error'] == error
    assert re.search(message, outcome['message'])
    assert '\n' not in outcome['message']
    if error == 'DownloadError':
        for remedy in ('HF_HOME', 't2t-timm convert', 'T2T_TIMM_HUB_NAMESPACE'):
            assert remedy in outcome['message']
    assert [f for f in outcome['files'] if not f.endswith('.incomplete')] == []
    assert not outcomes['executed']  # what the pickle of release_exploit asks for


@pytest.mark.slow
@pytest.mark.parametrize('case', [
    'file_missing', 'gated', 'get_503_always', 'short_always', 'wrong_bytes', 'head_503_always', 'no_network'])
def test_only_a_missing_repo_leads_to_the_release(outcomes, hosts, case):
    assert hosts.release.seen(f'/{case}.pth.tar') == []
    assert hosts.release.seen('/release_wrong.pth.tar') != []


@pytest.mark.slow
def test_every_step_is_logged_in_a_line(outcomes):
    assert outcomes['found']['log'] == [
        't2t_vit_7.in1k: asking the Hub for one/t2t_vit_7.in1k.',
        't2t_vit_7.in1k: verified (size, sha256).',
    ]
    assert outcomes['found_unknown']['log'] == [
        't2t_vit_10.in1k: asking the Hub for one/t2t_vit_10.in1k.',
        't2t_vit_10.in1k: unverified, as the manifest has no hash of one/t2t_vit_10.in1k; '
        "comparing with the Hub's own.",
        't2t_vit_10.in1k: verified (sha256).',
    ]
    asked, missing, unverified = outcomes['release']['log']
    assert asked == 't2t_vit_7.in1k: asking the Hub for two/t2t_vit_7.in1k.'
    assert re.fullmatch(
        r't2t_vit_7.in1k: there is no Hub repo two/t2t_vit_7.in1k; taking the release of its publisher, http://\S+',
        missing)
    assert 'unverified' in unverified
    assert 'verified (size, sha384)' in outcomes['release_dropped']['log'][-1]


@pytest.mark.slow
@pytest.mark.parametrize('case', [*UNREACHABLE, *NO_RELEASE])
def test_without_a_network_nothing_is_tried_again_and_one_error_is_shown(outcomes, case):
    assert [line for line in outcomes[case]['log'] if 'asking the Hub' not in line] == []
    assert outcomes[case]['hub_log'] == [] and outcomes[case]['chained'] == 0


@pytest.mark.slow
def test_a_dropped_download_goes_on_where_it_stopped(outcomes, hosts):
    assert hosts.release.seen('/release_dropped.pth.tar') == [(None, 200), (f'bytes={10 << 20}-', 206)]
    resumed = [r for _, path, r, status in hosts.storage.requests if r is not None and status == 206]
    assert resumed == [f'bytes={10 << 20}-']


@pytest.mark.slow
def test_a_killed_download_leaves_no_file_under_its_own_name(outcomes, hosts):
    found = outcomes['after_kill']
    assert 'release_killed.pth.tar' not in found['release_killed'] >= {'release_killed.pth.tar.incomplete'}
    # the branch's commit and the cache's mark, no blob and no snapshot
    assert {name for name in found['killed'] if not name.endswith(('.incomplete', '.lock'))} <= {'main', 'CACHEDIR.TAG'}
    assert hosts.release.seen('/release_killed.pth.tar') == [(None, 200), (f'bytes={10 << 20}-', 206)]


@pytest.mark.slow
def test_of_two_processes_one_downloads(outcomes, hosts):
    assert hosts.release.seen('/release_both.pth.tar') == [(None, 200)]
    logs = [outcomes[f'release_both, process {i}']['log'] for i in range(2)]
    assert sum(any('downloaded before' in line for line in log) for log in logs) == 1


def test_a_folder_where_nothing_can_be_kept_is_told(monkeypatch, tmp_path):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'file'))
    with pytest.raises(DownloadError, match=f'^{NAME} cannot be kept: {re.escape(str(tmp_path / "file"))}.*: .*.$'):
        pretrained_file(NAME)
