"""Where weights come from and what happens when something goes wrong on the way; the real client, loopback hosts."""
import hashlib
import os
import pickle
import re
import time
from pathlib import Path

import pytest
from hub_server import Fault, Repo
from loopback import BIG, TINY, Weights, finish

ALWAYS = 1000  # times that a fault happens
DROP = 12 << 20  # the client writes in pieces of 10 MB: a drop there leaves one piece to go on from


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Plan:
    """Cases for one process: what the hosts hold and do wrong, and which model is then created."""

    def __init__(self, hosts, folder: Path, namespace: str) -> None:
        self.hosts, self.folder, self.namespace = hosts, folder, namespace
        self.cases, self.weights, self.faulty = [], {}, {}

    def add(self, case, model, known=None, big=False, cache=True, release=None, hub=True, hub_knows=False, **fault):
        """Add a case: a Hub repo, or if not `hub` a release; `fault` is the Fault of the host that holds the file."""
        kwargs = BIG if big else TINY
        weights = Weights(len(self.weights) + 1, 't2t_vit_7', **kwargs)
        repo, name = f'{self.namespace}/{model}', f'/{case}.pth.tar'
        known = dict(known or {})
        if hub:
            self.hosts.hub.repos[repo] = Repo({'model.safetensors': weights.safetensors})
            path, server = f'/{sha256(weights.safetensors)}', self.hosts.storage
            if hub_knows:
                known['hub'] = dict(sha256=sha256(weights.safetensors), size=len(weights.safetensors))
        else:
            path, server = name, self.hosts.release
        self.hosts.release.files[name] = weights.pickle if release is None else release
        if fault:
            if 'HEAD' in fault.get('methods', ()):
                path, server = f'/{repo}/resolve/main/model.safetensors', self.hosts.hub
            server.faults[path] = [Fault(**fault)]
            self.faulty[case] = path
        self.weights[case] = weights
        self.cases.append(dict(
            case=case, model=model, kwargs=kwargs,
            known=dict(known, url=self.hosts.release.url + name, file=f'{case}.pth.tar'),
            cache_dir=str(self.folder / case) if cache else None,
        ))
        return weights

    def stage(self, only=None, known=True, **stage):
        cases = [c if known else {k: v for k, v in c.items() if k != 'known'} for c in self.cases]
        stage.setdefault('env', {}).setdefault('T2T_TIMM_HUB_NAMESPACE', self.namespace)
        return dict(stage, cases=[c for c in cases if only is None or c['case'] in only])


class Exploit:
    """A pickle that leaves a file behind if it is executed."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def plan_hub(hosts, folder) -> Plan:
    plan = Plan(hosts, folder, 'one')
    plan.add('found', 't2t_vit_7.in1k', hub_knows=True, cache=False)
    plan.add('found_unknown', 't2t_vit_10.in1k')
    plan.add('file_missing', 't2t_vit_12.in1k')
    hosts.hub.repos['one/t2t_vit_12.in1k'].files.clear()
    plan.add('gated', 't2t_vit_14.in1k')
    hosts.hub.repos['one/t2t_vit_14.in1k'].gated = True
    plan.add('head_503_once', 't2t_vit_19.in1k', status=503, methods=('HEAD',))
    plan.add('get_503_once', 't2t_vit_24.in1k', status=503)
    plan.add('get_503_always', 't2t_vit_24.tl_in1k', status=503, times=ALWAYS)
    plan.add('short_once', 't2t_vit_14_384.in1k', short=1000)
    plan.add('short_always', 't2t_vit_14.in1k_ft_cifar10', short=1000, times=ALWAYS)
    plan.add('dropped', 't2t_vit_19.in1k_ft_cifar10', big=True, hub_knows=True, drop=DROP)
    wrong = plan.add('wrong_bytes', 't2t_vit_14.in1k_ft_cifar100', hub_knows=True, times=ALWAYS)
    hosts.storage.faults[f'/{sha256(wrong.safetensors)}'][0].body = flipped(wrong.safetensors)
    wrong = plan.add('wrong_bytes_unknown', 't2t_vit_19.in1k_ft_cifar100', times=ALWAYS)
    hosts.storage.faults[f'/{sha256(wrong.safetensors)}'][0].body = flipped(wrong.safetensors)
    return plan


def plan_release(hosts, folder) -> Plan:
    plan = Plan(hosts, folder, 'two')
    weights = plan.add('release', 't2t_vit_7.in1k', hub=False, cache=False)
    # as GitHub does, the publisher sends the client on to a storage host
    hosts.storage.files['/moved'] = weights.training_pickle
    hosts.release.redirects['/release.pth.tar'] = f'{hosts.storage.url}/moved'
    plan.add('release_503_once', 't2t_vit_10.in1k', hub=False, status=503)
    plan.add('release_503_always', 't2t_vit_12.in1k', hub=False, status=503, times=ALWAYS)
    dropped = plan.add('release_dropped', 't2t_vit_14.in1k', hub=False, big=True, drop=DROP)
    plan.cases[-1]['known'].update(sha384=hashlib.sha384(dropped.pickle).hexdigest(), size=len(dropped.pickle))
    wrong = plan.add('release_wrong', 't2t_vit_19.in1k', hub=False, times=ALWAYS)
    plan.cases[-1]['known'].update(sha256_prefix=sha256(wrong.pickle)[:8])
    hosts.release.faults['/release_wrong.pth.tar'][0].body = flipped(wrong.pickle)
    plan.add('release_short', 't2t_vit_24.in1k', hub=False, short=100_000, times=ALWAYS)
    plan.add('release_gateway', 't2t_vit_24.tl_in1k', hub=False, body=b'<html>Please log in</html>', times=ALWAYS)
    exploit = pickle.dumps(dict(state_dict=Exploit(folder / 'executed')), protocol=2)
    plan.add('release_exploit', 't2t_vit_14_384.in1k', hub=False, release=exploit)
    plan.add('release_404', 't2t_vit_14.in1k_ft_cifar10', hub=False, status=404, times=ALWAYS)
    return plan


def plan_killed(hosts, folder) -> Plan:
    plan = Plan(hosts, folder, 'three')
    plan.add('killed', 't2t_vit_7.in1k', big=True, stall=DROP)
    weights = plan.add('release_killed', 't2t_vit_14.in1k', hub=False, big=True, stall=DROP)
    plan.cases[-1]['known'].update(sha256=sha256(weights.pickle))
    plan.add('head_503_always', 't2t_vit_10.in1k', status=503, methods=('HEAD',), times=ALWAYS)  # only in the rerun
    weights = plan.add('release_overfull', 't2t_vit_12.in1k', hub=False)  # likewise; a beginning that is no beginning
    plan.cases[-1]['known'].update(sha256=sha256(weights.pickle))
    (folder / 'release_overfull').mkdir()
    (folder / 'release_overfull' / 'release_overfull.pth.tar.incomplete').write_bytes(weights.pickle + b'more')
    return plan


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


FAILING = (
    'get_503_always', 'short_always', 'wrong_bytes', 'wrong_bytes_unknown', 'release_503_always', 'release_wrong',
    'release_short', 'release_gateway', 'release_404',
)


@pytest.fixture(scope='module')
def outcomes(hosts, start_client, tmp_path_factory):
    """Run every case, several processes at a time; return what came of each, by case."""
    folder = tmp_path_factory.mktemp('caches')
    hub, release = plan_hub(hosts, folder), plan_release(hosts, folder)
    killed, both = plan_killed(hosts, folder), Plan(hosts, folder, 'four')
    both.add('both', 't2t_vit_7.in1k', big=True, hub_knows=True)
    both.add('release_both', 't2t_vit_10.in1k', hub=False, big=True)
    unreachable = Plan(hosts, folder, 'five')
    unreachable.add('no_network', 't2t_vit_7.in1k')
    hub_only = dict(release.cases[0], case='hub_only', cache_dir=str(folder / 'hub_only'))
    faulty = {**hub.faulty, **release.faulty}

    main = start_client(
        hub.stage(),
        # alone: timm allows argparse.Namespace for all threads, and forbids it again for all
        release.stage(['release']),
        release.stage(list(release.faulty) + ['release_exploit']),
        dict(cases=[hub_only], env=dict(T2T_TIMM_HUB_ONLY='1')),
        release.stage(FAILING, env=dict(T2T_TIMM_HUB_ONLY='0'), post=(
            f'{hosts.hub.url}/control/heal', [faulty[case] for case in FAILING])),
        hub.stage(FAILING),
        both.stage(barrier=str(folder / 'barrier')),
    )
    victim = start_client(killed.stage(['killed', 'release_killed']))
    lonely = start_client(unreachable.stage(), HF_ENDPOINT='http://127.0.0.1:9')

    assert hosts.storage.stalled.acquire(timeout=60) and hosts.release.stalled.acquire(timeout=60)
    wait_for(lambda: size(folder / 'release_killed' / 'release_killed.pth.tar.incomplete') >= 10 << 20)
    victim.kill()
    victim.wait()
    after_kill = {case: files(folder / case) for case in ('killed', 'release_killed')}
    again = start_client(killed.stage(), both.stage(barrier=str(folder / 'barrier')))

    *stages, release_later, hub_later, twin = finish(main)
    cached = dict(hub.cases[0], case='offline_cached')
    empty = dict(hub.cases[0], case='offline_empty', cache_dir=str(folder / 'offline_empty'))
    release_cached = dict(release.cases[0], case='offline_release_cached')
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

    weights = {**hub.weights, **release.weights, **killed.weights, **both.weights, **unreachable.weights}
    weights.update({f'offline_{k}': weights[v] for k, v in (('cached', 'found'), ('release_cached', 'release'))})
    for case, r in result.items():
        r['expected_digest'] = weights[case.split(',')[0]].digest if r['ok'] else None
    return dict(result, after_kill=after_kill, executed=(folder / 'executed').exists())


def size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def files(folder: Path) -> list:
    return sorted(p.name for p in folder.rglob('*') if p.is_file())


def wait_for(condition, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


SUCCEEDING = (
    'found', 'found_unknown', 'head_503_once', 'get_503_once', 'short_once', 'dropped', 'release', 'release_503_once',
    'release_dropped', 'killed', 'release_killed', 'release_overfull', 'both, process 0', 'both, process 1',
    'release_both, process 0', 'release_both, process 1', 'offline_cached', 'offline_release_cached',
    *(f'{case}, later' for case in FAILING),
)


@pytest.mark.slow
@pytest.mark.parametrize('case', SUCCEEDING)
def test_loads_the_published_weights(outcomes, case):
    outcome = outcomes[case]
    assert outcome['ok'], outcome
    assert outcome['digest'] == outcome['expected_digest']
    assert outcome['cfg_file'] is None  # no path of this machine in what is saved and published


ERRORS = dict(
    file_missing=('DownloadError', r'The Hub repo one/t2t_vit_12.in1k has no model.safetensors'),
    gated=('DownloadError', r'The Hub repo one/t2t_vit_14.in1k is gated'),
    get_503_always=('DownloadError', r"Downloading one/t2t_vit_24.tl_in1k from the Hub failed. .*503"),
    short_always=('DownloadError', r'Downloading one/.* failed. .*should be of size \d+ but has size 1000'),
    wrong_bytes=('IntegrityError', r'the sha256 of model.safetensors should be [0-9a-f]{64} but is \w{64}\. .*del'),
    wrong_bytes_unknown=('IntegrityError', r'the sha256 of model.safetensors should be [0-9a-f]{64} but is \w{64}'),
    release_503_always=('DownloadError', r'Downloading http://\S+/release_503_always.pth.tar failed. .*503'),
    release_wrong=('IntegrityError', r'the sha256_prefix of \S+ should be [0-9a-f]{8} but is [0-9a-f]{8}\. .*deleted'),
    release_short=('IntegrityError', r'is no whole PyTorch file .* deleted'),
    release_gateway=('IntegrityError', r"is no whole PyTorch file \(it begins with b'<htm'\).* deleted"),
    release_exploit=('RuntimeError', r'weights_only=True blocked loading'),
    release_404=('DownloadError', r'Downloading http://\S+/release_404.pth.tar failed. .*404'),
    hub_only=('DownloadError', r'There is no Hub repo two/t2t_vit_7.in1k, and T2T_TIMM_HUB_ONLY forbids'),
    head_503_always=('DownloadError', r'The Hub could not be asked for three/t2t_vit_10.in1k, and no cache.*503'),
    no_network=('DownloadError', r'The Hub could not be asked for five/t2t_vit_7.in1k, and no cache has it. Connect'),
    offline_empty=('DownloadError', r'The Hub could not be asked for one/t2t_vit_7.in1k, and no cache has it. Offline'),
)


@pytest.mark.slow
@pytest.mark.parametrize('case', ERRORS)
def test_fails_with_one_clear_error_and_leaves_nothing_to_load(outcomes, case):
    error, message = ERRORS[case]
    outcome = outcomes[case]
    assert not outcome['ok']
    assert outcome['error'] == error
    assert re.search(message, outcome['message'])
    assert '\n' not in outcome['message'] or error == 'RuntimeError'
    if error == 'DownloadError':
        for remedy in ('HF_HOME', 't2t-timm convert', 'T2T_TIMM_HUB_NAMESPACE'):
            assert remedy in outcome['message']
    kept = ['release_exploit.pth.tar'] if case == 'release_exploit' else []  # whole, and refused again each time
    assert [f for f in outcome['files'] if not f.endswith('.incomplete')] == kept


@pytest.mark.slow
def test_nothing_in_a_pickle_is_executed(outcomes):
    assert not outcomes['executed']


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
        't2t_vit_10.in1k: unverified, the manifest knows no hash of one/t2t_vit_10.in1k; '
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
def test_a_dropped_download_goes_on_where_it_stopped(outcomes, hosts):
    requests = [r for r in hosts.release.seen('/release_dropped.pth.tar')]
    assert requests == [(None, 200), (f'bytes={10 << 20}-', 206)]
    resumed = [r for _, path, r, status in hosts.storage.requests if r is not None and status == 206]
    assert resumed == [f'bytes={10 << 20}-']


@pytest.mark.slow
def test_a_killed_download_leaves_no_file_under_its_own_name(outcomes, hosts):
    assert 'release_killed.pth.tar.incomplete' in outcomes['after_kill']['release_killed']
    assert 'release_killed.pth.tar' not in outcomes['after_kill']['release_killed']
    names = [name for name in outcomes['after_kill']['killed'] if not name.endswith(('.incomplete', '.lock'))]
    assert set(names) <= {'main', 'CACHEDIR.TAG'}  # the branch's commit and the cache's mark, no blob and no snapshot
    assert hosts.release.seen('/release_killed.pth.tar') == [(None, 200), (f'bytes={10 << 20}-', 206)]


@pytest.mark.slow
def test_of_two_processes_one_downloads(outcomes, hosts):
    assert hosts.release.seen('/release_both.pth.tar') == [(None, 200)]
    logs = [outcomes[f'release_both, process {i}']['log'] for i in range(2)]
    assert sum(any('downloaded before' in line for line in log) for log in logs) == 1
