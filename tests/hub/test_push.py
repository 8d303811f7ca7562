"""Push to the loopback Hub with the real client, push again, pull back."""
import re
import shutil

import pytest
from loopback import TINY, Weights, finish
from timm.models import create_model
from timm.models._hub import save_for_hf

from t2t_timm.cli import main
from t2t_timm.errors import UserError
from t2t_timm.hub.cards import architecture_card, for_repo
from t2t_timm.hub.push import FILES, default_repo, push
from t2t_timm.version import REPOSITORY

CARD = '---\nlibrary_name: timm\nlicense: apache-2.0\n---\n# A card, with an ü\n'


@pytest.fixture
def folder(tmp_path):
    """A folder as `t2t-timm convert` writes it."""
    model = create_model('t2t_vit_7', **TINY)
    model.load_state_dict(Weights(1, **TINY).state_dict)
    save_for_hf(model, tmp_path / 'out', model_args=TINY, safe_serialization=True)
    (tmp_path / 'out' / 'README.md').write_text(CARD, encoding='utf-8')
    return tmp_path / 'out'


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError('a connection was opened')
    monkeypatch.setattr('socket.socket.connect', refuse)
    monkeypatch.setattr('socket.getaddrinfo', refuse)


def test_the_default_repo_is_the_one_that_pretrained_loads(folder, monkeypatch):
    monkeypatch.delenv('T2T_TIMM_HUB_NAMESPACE', raising=False)
    assert default_repo(folder) == 't2t-timm/t2t_vit_7.in1k'
    monkeypatch.setenv('T2T_TIMM_HUB_NAMESPACE', 'someone')
    assert default_repo(folder) == 'someone/t2t_vit_7.in1k'


def test_dry_run_shows_what_would_go_and_keeps_off_the_network(folder, no_network, capsys, caplog):
    caplog.set_level('INFO')
    assert main(['push', str(folder), 'someone/model', '--dry-run']) == 0
    assert capsys.readouterr().out == 'hf-hub:someone/model\n'
    files = ', '.join(f'{name} ({(folder / name).stat().st_size} bytes)' for name in FILES)
    assert caplog.messages == [f'Not uploaded, as this is a dry run: {files} to someone/model.']


@pytest.mark.parametrize('name', FILES)
def test_a_missing_file_is_named(folder, no_network, capsys, name):
    (folder / name).unlink()
    assert main(['push', str(folder)]) == 1
    assert re.search(rf'has no {name}: name a folder that `t2t-timm convert` wrote', capsys.readouterr().err)


@pytest.mark.parametrize('config, message', [
    ('not json', 'is not readable JSON'),
    ('[]', 'names no architecture and tag'),
    ('{"architecture": "t2t_vit_7"}', 'names no architecture and tag'),
])
def test_a_config_that_names_no_repo(folder, no_network, config, message):
    (folder / 'config.json').write_text(config)
    with pytest.raises(UserError, match=message):
        push(folder)


@pytest.mark.parametrize('repo', ['a/b/c', 'some one/model', '../model'])
def test_a_name_that_is_no_repo(folder, no_network, repo):
    with pytest.raises(UserError, match='is not the name of a Hub repo'):
        push(folder, repo)


def test_a_card_with_places_to_fill_in_is_refused_unless_forced(folder, no_network, capsys, caplog):
    caplog.set_level('INFO')
    (folder / 'README.md').write_text(architecture_card('t2t_vit_7', 3, (3, 224, 224)), encoding='utf-8')
    command = ['push', str(folder), 'someone/model', '--dry-run']
    assert main(command) == 1
    assert capsys.readouterr().err == (
        f't2t-timm push: {folder / "README.md"} does not say yet: Trained by, Trained on, Accuracy, Use and limits, '
        'Licence. Write it there, or upload the card as it is with --force.\n')
    assert main([*command, '--force']) == 0
    text = (folder / 'README.md').read_text(encoding='utf-8')
    (folder / 'README.md').write_text(text.replace('FILL IN', 'me'), encoding='utf-8')
    assert main(command) == 0
    size = len(for_repo(text.replace('FILL IN', 'me'), 'someone/model').encode())
    assert f'README.md ({size} bytes) to someone/model.' in caplog.messages[-1]
    assert ('put its address in the place of OWNER' in caplog.text) == ('/OWNER/' in REPOSITORY)


@pytest.mark.slow
def test_push_push_again_and_pull_back(folder, hosts, start_client):
    hub = 'someone/t2t_vit_7.in1k'
    changed = shutil.copytree(folder, folder.with_name('changed'))
    (changed / 'README.md').write_text(CARD + "More: 'local-dir:DIR', model='DIR'.\r\n", encoding='utf-8', newline='')
    refused, pushed = finish(start_client(
        dict(env=dict(HF_TOKEN=''), commands=[['push', str(folder), 'someone/refused']]),
        dict(
            env=dict(HF_TOKEN='hf_loopback', T2T_TIMM_HUB_NAMESPACE='someone'),
            commands=[['push', str(folder)], ['push', str(folder), '--private'], ['push', str(changed)]],
            cases=[
                dict(case='tag', model='t2t_vit_7.in1k', kwargs=TINY),
                dict(case='hf-hub', model=f'hf-hub:{hub}'),
                dict(case='local-dir', model=f'local-dir:{folder}'),
            ],
        ),
    ))
    for command in pushed['commands']:
        assert command['code'] == 0, command['err']
    first, again, update = pushed['commands']
    assert first['out'] == again['out'] == update['out'] == f'hf-hub:{hub}\n'
    commits = [re.search(r'someone/t2t_vit_7.in1k is at commit ([0-9a-f]{40})', c['log'][-1])[1] for c in pushed['commands']]
    assert commits[0] == commits[1] != commits[2]
    repo = hosts.hub.repos[hub]
    assert repo.commits == 3  # the repo's own first commit, and two of ours
    assert len(hosts.hub.seen(f'/api/models/{hub}/commit/main', 'POST')) == 2
    card = (CARD + f"More: 'hf-hub:{hub}', model='{hub}'.\r\n").encode()
    for name in FILES:
        assert repo.files[name] == (card if name == 'README.md' else (changed / name).read_bytes())

    digests = {case: r.get('digest', r) for case, r in pushed['cases'].items()}
    assert digests == dict.fromkeys(['tag', 'hf-hub', 'local-dir'], Weights(1, **TINY).digest)

    refused, = refused['commands']
    assert refused['code'] == 1
    assert re.fullmatch(
        r't2t-timm push: someone/refused could not be uploaded\. .*401.*hf auth login.*',
        refused['err'].splitlines()[-1])
    assert 'someone/refused' not in hosts.hub.repos
