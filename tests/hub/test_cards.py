"""Model cards: up to date, read by the Hub's own parser, honest about who measured what; their snippets run."""
import contextlib
import io
import logging
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

import t2t_timm
from t2t_timm.cli import main
from t2t_timm.digits import extract_heldout
from t2t_timm.errors import UserError
from t2t_timm.hub.cards import architecture_card, for_repo, places_to_fill_in, tag_card, write_cards
from t2t_timm.hub.complexity import known_complexity, model_complexity
from t2t_timm.hub.convert import convert
from t2t_timm.recipes import recipe_path
from t2t_timm.version import REPOSITORY

ROOT = Path(__file__).parents[2]
CARDS = ROOT / 'model_cards'
MANIFEST = yaml.safe_load((Path(t2t_timm.__file__).parent / 'weights' / 'manifest.yaml').read_text(encoding='utf-8'))
TAGS = list(MANIFEST['weights'])
PHOTO = 'https://huggingface.co/datasets/huggingface/documentation-images/resolve/main/pipeline-cat-chonk.jpeg'


def committed(name):
    return (CARDS / f'{name}.md').read_text(encoding='utf-8')


def test_the_committed_cards_are_what_is_written_anywhere(tmp_path, monkeypatch):
    monkeypatch.setenv('T2T_TIMM_HUB_NAMESPACE', 'someone')
    assert main(['cards', '--out', str(tmp_path / 'cards')]) == 0
    written, cards = ({path.name: path.read_bytes() for path in f.iterdir()} for f in (tmp_path / 'cards', CARDS))
    assert sorted(cards) == sorted(f'{name}.md' for name in TAGS)
    assert [name for name in cards if written[name] != cards[name]] == []


def test_stale_cards_are_named(tmp_path):
    folder = tmp_path / 'cards'
    shutil.copytree(CARDS, folder)
    (folder / f'{TAGS[0]}.md').unlink()
    (folder / f'{TAGS[1]}.md').write_text('old', encoding='utf-8')
    (folder / 'gone.in1k.md').write_text('of no tag', encoding='utf-8')
    with pytest.raises(UserError, match=f': gone.in1k.md, {TAGS[1]}.md, {TAGS[0]}.md. Run'):
        write_cards(folder, check=True)
    assert (folder / f'{TAGS[1]}.md').read_text(encoding='utf-8') == 'old'


def test_figures_that_are_not_what_is_counted_make_no_cards(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    known = known_complexity()
    figures = dict(known, **{'t2t_vit_12.in1k': known['t2t_vit_12.in1k']._replace(macs=1)})
    monkeypatch.setattr('t2t_timm.hub.cards.known_complexity', lambda: figures)
    with pytest.raises(UserError, match='what stands above'):
        write_cards(tmp_path / 'cards')
    assert re.search(r't2t_vit_12.in1k:\s+params: \d+\s+macs: 1762638336\s', caplog.text)
    assert not (tmp_path / 'cards').exists()


@pytest.mark.parametrize('name', TAGS)
def test_front_matter(name):
    entry = MANIFEST['weights'][name]
    dataset = MANIFEST['datasets'][entry.get('dataset', 'imagenet-1k')]
    reporter = MANIFEST['reporters'][entry['reported_by']]
    data = ModelCard(committed(name)).data
    assert (data.library_name, data.pipeline_tag, data.model_name) == ('timm', 'image-classification', name)
    assert data.license == MANIFEST['sources'][entry['source']]['license']
    assert {'image-classification', 'timm'} <= set(data.tags)
    assert data.datasets[0] == dataset['hub']
    assert ('ILSVRC/imagenet-1k' in data.datasets) == ('in1k' in name)
    assert data.base_model == (f't2t-timm/{name.split(".")[0]}.in1k' if 'in1k_ft' in name else None)
    assert {result.metric_name: result.metric_value for result in data.eval_results} == {
        f'top-{k} accuracy': entry[f'top{k}'] for k in (1, 5) if f'top{k}' in entry}
    for result in data.eval_results:
        assert (result.task_type, result.metric_type) == ('image-classification', 'accuracy')
        assert (result.dataset_type, result.dataset_name) == (dataset['hub'], dataset['name'])
        assert (result.source_url, result.source_name) == (
            reporter.get('url'), reporter['name'] if 'url' in reporter else None)


@pytest.mark.parametrize('name', TAGS)
def test_body(name):
    train = 'DIGITS' if name == 'test_t2t_vit.mnist' else 'DATA'  # `t2t-timm digits DATA` has the held-out digits only
    entry, text = MANIFEST['weights'][name], committed(name)
    for part in (
            f'```sh\npip install git+{REPOSITORY}\n',
            'Intended Use and Limits',
            f'validate.py --data-dir DATA --model {name} --pretrained',
            f'train.py --data-dir {train} --config $(t2t-timm recipe ',
            '@InProceedings{Yuan_2021_ICCV',
            MANIFEST['sources'][entry['source']]['notice'],
    ):
        assert part in text, part
    assert ('white digit on black' in text) == (name == 'test_t2t_vit.mnist')
    measured_here = entry['reported_by'] == 't2t-timm'
    assert ('this project has not measured it' in text) == (not measured_here)
    assert ('measured by this project' in text) == measured_here


@pytest.mark.parametrize('name', TAGS)
def test_the_comparison_is_short_and_names_each_model_once(name):
    rows = re.findall(r'^\| (?!weights|---)(.*?) \|', committed(name), re.MULTILINE)
    links = [re.fullmatch(r'\[(\S+)\]\(https://huggingface.co/t2t-timm/\1\)', row) for row in rows]
    assert [row for row, link in zip(rows, links, strict=True) if not link] == [f'**{name}**']
    linked = [link[1] for link in links if link]
    assert len(set(linked)) == len(linked) <= 11 and name not in linked
    assert all(MANIFEST['weights'][other].get('dataset') is None for other in linked)


@pytest.mark.parametrize('name', TAGS)
def test_the_recipe_of_a_card_trains_such_weights(name):
    path = recipe_path(re.search(r'\$\(t2t-timm recipe (\w+)\)', committed(name))[1])
    recipe = yaml.safe_load(Path(path).read_text('utf-8'))
    dataset = MANIFEST['datasets'][MANIFEST['weights'][name].get('dataset', 'imagenet-1k')]
    model = timm.create_model(recipe['model'], num_classes=recipe.get('num_classes'), device='meta')
    assert recipe['model'] == name.split('.')[0]
    assert model.num_classes == dataset['num_classes']
    assert recipe.get('pretrained', False) == ('in1k_ft' in name)


def run(code):
    """Run a block alone and return its names and what it printed."""
    names, out = {}, io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, names)
    return names, out.getvalue().splitlines()


@pytest.fixture(params=['t2t_vit_7.in1k', 't2t_vit_14.in1k_ft_cifar10', 'test_t2t_vit.mnist', 'own', 'grey'])
def snippets(request, tmp_path, monkeypatch, embedded_folder):
    """The Python blocks of a card: images by URL are a file, the Hub repo a folder, published weights random ones."""
    monkeypatch.chdir(tmp_path)
    extract_heldout('digits')
    photo = tmp_path / 'photo.jpg'
    Image.linear_gradient('L').convert('RGB').save(photo)
    if request.param in ('own', 'grey'):
        (tmp_path / 'names.txt').write_text('cat\ndog\n')
        model = timm.create_model('test_t2t_vit', num_classes=2, in_chans=1 if request.param == 'grey' else 3)
        torch.save(model.state_dict(), tmp_path / 'own.pth')
        repo = convert(tmp_path / 'own.pth', 'test_t2t_vit', tmp_path / 'own', labels=tmp_path / 'names.txt')
        text = (repo / 'README.md').read_text(encoding='utf-8').replace('DIR', str(repo))
    else:
        text, repo = committed(request.param), embedded_folder
    text = text.replace(f"urlopen(\n    '{PHOTO}", f"urlopen(\n    '{photo.as_uri()}").replace(PHOTO, str(photo))
    text = re.sub(r"('t2t_vit_\S+'), pretrained=True", r'\1', text)
    text = re.sub(r"model='t2t-timm/\S+?'", f"model='{repo}'", text)
    return request.param, re.findall(r'^```python\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)


def test_snippets_run_as_they_are_pasted(snippets):
    name, (classification, features, *_) = snippets
    _, printed = run(classification)
    answers = [line.split(' ', 1) for line in printed]
    assert len(answers) == (2 if name in ('own', 'grey') else 5)
    assert answers == sorted(answers, key=lambda answer: -float(answer[0]))
    if name == 'test_t2t_vit.mnist':
        assert printed[0] == '0.903 three'
    elif name in ('own', 'grey'):
        assert {answer[1] for answer in answers} == {'cat', 'dog'}
    else:
        assert all(answer[1].replace('_', ' ').replace(', ', '').isprintable() for answer in answers)
    found, _ = run(features)
    assert f'strides 4, 8 and 16: {", ".join(str(tuple(m.shape)) for m in found["maps"])}\n' in features
    assert f'# {tuple(found["embedding"].shape)}\n' in features
    assert f'# {tuple(found["tokens"].shape)}, class token first' in features


@pytest.mark.slow
def test_the_snippet_for_transformers_runs(snippets):
    pytest.importorskip('transformers', reason='pip install transformers')
    name, found = snippets
    assert len(found) == (2 if name in ('test_t2t_vit.mnist', 'grey') else 3)  # not published; one channel
    for code in found[2:]:
        _, (printed,) = run(code)
        assert "'label'" in printed and "'score'" in printed


@pytest.mark.parametrize('name, params, macs', [  # as the paper reports them, tables 2 and 3
    ('t2t_vit_7', 4.3, 1.1), ('t2t_vit_14', 21.5, 4.8), ('t2t_vit_19', 39.2, 8.5), ('t2t_vit_24', 64.1, 13.8),
    ('t2t_vit_t_14', 21.5, 6.1), ('t2t_vit_t_19', 39.2, 9.8), ('t2t_vit_t_24', 64.1, 15.0),
])
def test_figures_of_the_paper(name, params, macs):
    cost = known_complexity()[f'{name}.in1k']  # which are counted again above
    assert cost.params / 1e6 == pytest.approx(params, rel=0.012)
    assert cost.macs / 1e9 == pytest.approx(macs, rel=0.045)


def test_activations_of_a_known_layer():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, device='meta'), torch.nn.ReLU(), torch.nn.Flatten(),
                                torch.nn.Linear(8 * 6 * 6, 5, device='meta'))
    assert model_complexity(model, (3, 8, 8)) == (8 * 27 + 8 + 5 * 288 + 5, 8 * 36 * 27 + 288 * 5, 8 * 36 + 5)


def test_the_card_of_weights_of_ones_own():
    card = ModelCard(architecture_card('t2t_vit_7', 3, (3, 224, 224), ['a', 'b', 'c']))
    assert card.data.license is None and card.data.eval_results is None
    assert places_to_fill_in(card.text) == ['Trained by', 'Trained on', 'Accuracy', 'Use and limits', 'Licence']
    named = for_repo(card.text, 'me/photos')
    assert "timm.create_model('hf-hub:me/photos', pretrained=True)" in named and 'DIR' not in named
    assert "pipeline('image-classification', model='me/photos')" in named


def test_a_card_for_another_repo_names_that_and_links_to_the_others():
    card = for_repo(tag_card('t2t_vit_14.in1k_ft_cifar10'), 'acme/t2t_vit_14.in1k_ft_cifar10')
    assert "model='acme/t2t_vit_14.in1k_ft_cifar10'" in card and places_to_fill_in(card) == []
    assert ModelCard(card).data.base_model == 't2t-timm/t2t_vit_14.in1k'


def test_the_address_of_the_project_is_the_same_everywhere():
    """docs/releasing.md says how all are set at once."""
    for name in ('README.md', 'CITATION.cff', 'setup.cfg', 'docs/gpu.md', 'model_cards/t2t_vit_14.in1k.md'):
        text = (ROOT / name).read_text(encoding='utf-8')
        found = re.findall(r'https://[\w.]+/[\w.-]+/t2t-timm\b(?=$|[\s/.])', text, re.MULTILINE)
        assert set(found) == {REPOSITORY}, name
