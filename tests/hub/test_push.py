"""Push to the loopback Hub with the real client, push again, pull back."""
import re
import shutil

import pytest
from loopback import TINY, Weights, finish
from timm.models import create_model
from timm.models._hub import save_for_hf

from t2t_timm.cli import main
from t2t_timm.hub.cards import architecture_card, for_repo
from t2t_timm.hub.push import FILES
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
def dry_run(folder, monkeypatch, capsys, caplog, no_network):
    """A function that pushes without a network and returns the exit code and what was printed and logged."""
    monkeypatch.delenv('T2T_TIMM_HUB_NAMESPACE', raising=False)
    caplog.set_level('INFO')

    def dry_run(*args):
        code = main(['push', str(folder), *args, '--dry-run'])
        return code, *capsys.readouterr(), caplog.text
    return dry_run


def test_dry_run_shows_what_would_go(folder, dry_run):
    code, out, _, log = dry_run('someone/model')
    files = ', '.join(f'{name} ({(folder / name).stat().st_size} bytes)' for name in FILES)
    assert (code, out) == (0, 'hf-hub:someone/model\n')
    assert f'Not uploaded, as this is a dry run: {files} to someone/model.' in log


def test_the_default_repo_is_the_one_that_pretrained_loads(dry_run, monkeypatch):
    assert dry_run()[1] == 'hf-hub:t2t-timm/t2t_vit_7.in1k\n'
    monkeypatch.setenv('T2T_TIMM_HUB_NAMESPACE', 'someone')
    assert dry_run()[1] == 'hf-hub:someone/t2t_vit_7.in1k\n'


@pytest.mark.parametrize('file, content, repo, words', [
    *((name, None, '', f'has no {name}: name a folder that `t2t-timm convert` wrote') for name in FILES),
    ('README.md', b'\xfc', 'a/b', 'README.md is not a text file in UTF-8'),
    ('config.json', b'not json', '', 'is not readable JSON'),
    ('config.json', b'{"architecture": "t2t_vit_7", "model_args": 5}', '', 'should have model_args as names'),
    ('config.json', b'[]', '', 'names no architecture and tag'),
    ('config.json', b'{"architecture": "t2t_vit_7"}', '', 'names no architecture and tag'),
    *(('README.md', b'', repo, 'Repo id must ') for repo in ('a/b/c', 'some one/model', '../model')),
])
def test_what_cannot_be_pushed(folder, dry_run, file, content, repo, words):
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_bytes(content)
    code, out, err, _ = dry_run(*filter(None, [repo]))
    assert (code, out) == (1, '') and words in err


def test_a_card_with_places_to_fill_in_is_refused_unless_forced(folder, dry_run):
    text = architecture_card('t2t_vit_7', 3, (3, 224, 224))
    (folder / 'README.md').write_text(text, encoding='utf-8')
    code, _, err, _ = dry_run('someone/model')
    assert code == 1 and err == (
        f't2t-timm push: {folder / "README.md"} does not say yet: Trained by, Trained on, Accuracy, Use and limits, '
        'Licence. Write it there, or upload the card as it is with --force.\n')
    assert dry_run('someone/model', '--force')[0] == 0
    text = text.replace('FILL IN', 'me')
    (folder / 'README.md').write_text(text, encoding='utf-8')
    code, _, _, log = dry_run('someone/model')
    assert code == 0 and f'README.md ({len(for_repo(text, "someone/model").encode())} bytes) to someone/model.' in log
    assert ('put its address in the place of OWNER' in log) == ('/OWNER/' in REPOSITORY)


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
    commits = []
    for command in pushed['commands']:
        assert (command['code'], command['out']) == (0, f'hf-hub:{hub}\n'), command['err']
        commits.append(re.search(r'someone/t2t_vit_7.in1k is at commit ([0-9a-f]{40})', command['log'][-1])[1])
    assert commits[0] == commits[1] != commits[2]
    repo = hosts.hub.repos[hub]
    assert repo.commits == 3  # the repo's own first commit, and two of ours
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
