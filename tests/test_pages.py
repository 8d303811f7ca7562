"""Pages that need no program of timm's: their code runs as it is written there, and prints what stands below it."""
import contextlib
import io
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

from t2t_timm.cli import main
from t2t_timm.commands.images import open_image
from t2t_timm.digits import extract_heldout
from t2t_timm.hub.complexity import count_complexity
from t2t_timm.weights.manifest import load_manifest

ROOT = Path(__file__).parents[1]
NEEDS = {'transformers.md': 'transformers accelerate', 'segmentation.md': 'segmentation_models_pytorch'}
PAGES = (
    'README.md', 'docs/python.md', 'docs/segmentation.md', pytest.param('docs/embeddings.md', marks=pytest.mark.slow),
    pytest.param('docs/transformers.md', marks=pytest.mark.slow))
ALONE = ('docs/segmentation.md',)  # each block runs by itself
BLOCK = re.compile(r'^```(python|sh)\n(.*?)^```$(?:\n+^```\n(.*?)^```$)?', re.MULTILINE | re.DOTALL)
NUMBER = re.compile(r'-?\d+(?:\.\d+)?(?:e-?\d+)?')


def run(language, code, names):
    """Run a block of a page and return what it printed; of shell blocks, the lines that call t2t-timm."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        if language == 'python':
            # the published weights are not here: their models get random ones
            exec(re.sub(r"('t2t_vit_\w+'), pretrained=True", r'\1', code), names)
        else:
            for line in re.findall(r'^t2t-timm .*', code, re.MULTILINE):
                assert main(shlex.split(line, comments=True)[1:]) == 0, line
    return out.getvalue()


@pytest.mark.parametrize('page', PAGES)
def test_code_of_page(page, tmp_path, monkeypatch):
    for package in NEEDS.get(Path(page).name, '').split():
        pytest.importorskip(package, reason=f'pip install {package}')
    monkeypatch.chdir(tmp_path)
    names, compared = {'__name__': '__main__'}, 0
    for language, code, expected in BLOCK.findall((ROOT / page).read_text(encoding='utf-8')):
        printed = run(language, code, {} if page in ALONE else names)
        if expected:
            compared += 1
            assert NUMBER.sub('#', printed).split() == NUMBER.sub('#', expected).split(), code
            for number, of_page in zip(NUMBER.findall(printed), NUMBER.findall(expected), strict=True):
                assert float(number) == pytest.approx(float(of_page), rel=0.02, abs=0.02), code
    assert compared


def test_rewritten_photos_are_read_alike(tmp_path, monkeypatch, capsys):
    """The script of transfer.md: what a plain reader sees in its copies is what classify sees in the photos."""
    monkeypatch.chdir(tmp_path)
    Path('photos', 'a').mkdir(parents=True)
    grey, exif = np.arange(256, dtype=np.uint16).reshape(8, 32), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(grey.astype(np.uint8)).save('photos/a/plain.jpg')
    Image.fromarray(grey.astype(np.uint8)).save('photos/a/turned.jpg', exif=exif)
    Image.fromarray(np.stack([grey, grey[::-1]], axis=2).astype(np.uint8), 'LA').save('photos/transparent.png')
    Image.fromarray(grey * 257).save('photos/sixteen.png')
    Image.fromarray(grey.astype(np.uint8)).save('photos/other.tif')
    Path('photos/text.png').write_text('text')
    script, = (code for _, code, _ in BLOCK.findall((ROOT / 'docs' / 'transfer.md').read_text(encoding='utf-8'))
               if 'open_image' in code)
    exec(re.search(r"<<'END'\n(.*)^END$", script, re.MULTILINE | re.DOTALL)[1], {})
    assert capsys.readouterr().out.startswith(f'{Path("photos/text.png")}: cannot identify image file')
    copies = sorted(Path('upright').rglob('*.*'))
    assert [str(path.relative_to('upright').as_posix()) for path in copies] == [
        'a/plain.jpg', 'a/turned.jpg.png', 'other.tif.png', 'sixteen.png.png', 'transparent.png.png']
    for copy in copies:
        photo = Path('photos', copy.relative_to('upright'))
        expected = open_image(str(photo if photo.exists() else photo.with_suffix('')))
        with Image.open(copy) as image:
            assert image.size == expected.size and image.convert('RGB').tobytes() == expected.tobytes()
    assert Image.open('upright/a/turned.jpg.png').size == (8, 32)


def test_every_page_is_listed_and_every_link_leads_somewhere():
    docs = ROOT / 'docs'
    listed = set(re.findall(r'\]\((\w+\.md)\)', (docs / 'README.md').read_text(encoding='utf-8')))
    assert listed == {path.name for path in docs.glob('*.md')} - {'README.md'}
    for path in (ROOT / 'README.md', *docs.glob('*.md')):
        links = re.findall(r'\]\(([^)#]*)', path.read_text(encoding='utf-8'))
        assert [link for link in links if not link.startswith('https://') and not (path.parent / link).exists()] == []


def test_choosing_has_every_model_with_the_figures_of_the_manifest():
    page = (ROOT / 'docs' / 'choosing.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| `(\w+)` \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]*)(?:, .*)? ?\|$', page, re.MULTILINE)
    assert sorted(row[0] for row in rows) == sorted(timm.list_models('*t2t_vit*'))
    weights = load_manifest()['weights']
    for name, *figures, top1 in rows:
        cfg = timm.get_pretrained_cfg(name)
        cost = count_complexity(name, cfg.num_classes, cfg.input_size)
        assert figures == [f'{count:.2f}' for count in (
            cost.params / 1e6, cost.macs / 1e9, cost.activations / 1e6)], name
        known = next((entry.top1 for tag, entry in weights.items() if tag.split('.')[0] == name), None)
        assert top1 == ('' if known is None else f'{known:.1f}'), name


@pytest.mark.slow
def test_plot_has_the_figures_of_the_manifest(tmp_path):
    pytest.importorskip('matplotlib', reason='pip install t2t-timm[plot]')
    tool = runpy.run_path(str(ROOT / 'tools' / 'plot_accuracy.py'))
    tool['draw'](tmp_path / 'plot.png')
    assert (tmp_path / 'plot.png').read_bytes()[:4] == b'\x89PNG'
    points = {name: figures for family in tool['points']().values() for name, *figures in family}
    readme = (ROOT / 'README.md').read_text(encoding='utf-8').partition('## ')[0]
    for name, stated in (('t2t_vit_14', (4.8, 81.5)), ('deit_small_patch16_224', (4.6, 79.9))):
        assert points[name] == pytest.approx(stated, abs=0.05) and all(str(number) in readme for number in stated)


def test_the_picture_of_the_readme_shows_what_its_text_says(tmp_path):
    pytest.importorskip('matplotlib', reason='pip install t2t-timm[plot]')
    tool = runpy.run_path(str(ROOT / 'tools' / 'plot_answer.py'))
    tool['draw'](tmp_path / 'plot.png')
    assert (tmp_path / 'plot.png').read_bytes()[:4] == b'\x89PNG'
    image = Image.open(extract_heldout(tmp_path / 'digits') / tool['DIGIT']).convert('RGB')
    shown = ', '.join(f'{name} {p:.3f}' for name, p in list(tool['answer'](image).items())[:4])
    assert f'likeliest classes: {shown}](docs/first_steps.png)' in (ROOT / 'README.md').read_text(encoding='utf-8')
