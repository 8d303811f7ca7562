"""docs/transfer.md: every command as it stands there, in order, against a loopback Hub."""
import json
import re

import pytest
from hub_server import FileServer, HubServer
from pages import top1

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def hub():
    storage = FileServer()
    hub = HubServer(storage)
    with storage.running(), hub.running():
        yield hub


@pytest.fixture(scope='module')
def transferred(open_page, hub, tmp_path_factory):
    """The page, and what each of its blocks printed."""
    for name in ('matplotlib', 'sklearn'):
        pytest.importorskip(name, reason='the sample photos: pip install matplotlib scikit-learn')
    page = open_page(
        'transfer.md', HF_HUB_OFFLINE='0', HF_ENDPOINT=hub.url, HF_TOKEN='hf_loopback', HF_HUB_DISABLE_XET='1',
        HF_HUB_DISABLE_TELEMETRY='1', HF_HOME=str(tmp_path_factory.mktemp('hf')), NO_PROXY='127.0.0.1',
        OMP_NUM_THREADS='1')
    return page, [page.run(block) for block in page.blocks[1:]]


def test_the_figures_are_those_of_the_page(transferred):
    page, (_, _, _, _, trained, converted, _, loaded) = transferred
    held_out = len(list((page.folder / 'data' / 'validation').rglob('*.jpg')))
    assert held_out == 39 and len(list((page.folder / 'data' / 'train').rglob('*.jpg'))) == 153
    assert top1(trained) == pytest.approx(top1(page.text), abs=11)
    assert 'largest difference of the logits: ' in converted and '(no more than 0.0001)' in converted
    assert top1(loaded) == pytest.approx(top1(trained), abs=1e-3)


def test_the_recipe_trains_on_a_folder_of_photos(transferred):
    """As it is written there, but for a small model and one epoch."""
    page, _ = transferred
    command, = re.findall(r'^```bash\n(.*?)^```$', page.text, re.MULTILINE | re.DOTALL)
    out = page.run(
        f'{command.strip()}-recipe --model test_t2t_vit --img-size 56 --epochs 1 --batch-size 16 --workers 1 '
        '--device cpu')
    assert re.search(r'Train: 0 \[ +\d+/\d+ \(100%\)\]', out) and top1(out) > 20


def test_the_classes_have_their_names(transferred):
    _, (*_, converted, _, loaded) = transferred
    for out, name in ((converted, 'flower'), (loaded, 'temple')):
        labels = re.findall(r'^ +[\d.]+ %  (\w+) \(\d\)', out, re.MULTILINE)
        assert set(labels) <= {'flower', 'portrait', 'temple'}
        assert labels.count(name) > 0.6 * len(labels) > 0
    assert "['flower', 'portrait', 'temple']" in loaded


def test_what_is_on_the_hub(transferred, hub):
    *_, pushed, _ = transferred[1]
    assert 'Not uploaded, as this is a dry run: ' in pushed and 'someone/photos is now at commit' in pushed
    files = hub.repos['someone/photos'].files
    assert b"'hf-hub:someone/photos'" in files['README.md'] and b'DIR' not in files['README.md']
    config = json.loads(files['config.json'])
    assert (config['num_classes'], config['label_names']) == (3, ['flower', 'portrait', 'temple'])
    assert b'Classes: flower, portrait, temple.' in files['README.md'] and b'mnist' not in files['README.md']
