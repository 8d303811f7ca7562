"""The folder that transformers.js reads: what is in it, and what Node makes of it."""
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import timm
import torch

from t2t_timm.commands.export import export_model
from t2t_timm.commands.images import ImageReader
from t2t_timm.errors import UserError

CLASSIFY = '''
const { env, pipeline } = require('@huggingface/transformers');
const [root, name, dtype, image] = process.argv.slice(1);
env.allowRemoteModels = false;
env.localModelPath = root;
pipeline('image-classification', name, { dtype, device: 'cpu' })
  .then((classify) => classify(image, { top_k: 10 }))
  .then((found) => console.log(JSON.stringify(found)));
'''


@pytest.fixture(scope='module')
def exported(tmp_path_factory, digits):
    """The embedded model, and the folder made of it, with int8."""
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(name, reason='pip install t2t-timm[onnx]')
    model = timm.create_model('test_t2t_vit', pretrained=True).eval()
    folder = tmp_path_factory.mktemp('exported') / 'model'
    folder.mkdir()  # an empty one is taken
    done = export_model(model, folder, 'transformers.js', 'int8', digits)
    assert done.agreement.images == 100 and done.agreement.same >= 98
    assert done.size == sum(file.stat().st_size for file in folder.rglob('*.*'))
    return model, folder


def test_files(exported):
    _, folder = exported
    assert sorted(str(p.relative_to(folder)) for p in folder.rglob('*.*')) == [
        'config.json', str(Path('onnx', 'model.onnx')), str(Path('onnx', 'model_quantized.onnx')),
        'preprocessor_config.json']
    config = json.loads((folder / 'config.json').read_text())
    assert config['model_type'] == 'vit' and config['id2label']['3'] == 'three' and len(config['id2label']) == 10
    config = json.loads((folder / 'preprocessor_config.json').read_text())
    assert config['image_processor_type'] == 'ViTImageProcessor' and config['resample'] == 3  # Pillow's bicubic
    assert config['size'] == {'shortest_edge': 56} and config['crop_size'] == {'height': 56, 'width': 56}
    assert config['image_mean'] == [0.485, 0.456, 0.406]


def test_preprocessing_is_timms(exported, heldout):
    """As Python's image processor reads the file, with Pillow's resampling, which timm takes too."""
    transformers = pytest.importorskip('transformers', reason='pip install transformers')
    from PIL import Image
    model, folder = exported
    file = heldout / '3_three' / '1509.png'
    processor = getattr(transformers, 'ViTImageProcessorPil', transformers.ViTImageProcessor).from_pretrained(folder)
    pixels = processor(Image.open(file).convert('RGB'), return_tensors='pt')['pixel_values']
    torch.testing.assert_close(pixels, ImageReader(model)(str(file)), atol=1e-5, rtol=0)


@pytest.mark.parametrize('dtype', ['fp32', 'q8'])
def test_node(exported, heldout, dtype):
    _, folder = exported
    node = shutil.which('node')
    if node is None:
        pytest.skip('node is not there: install Node.js 20 or newer')
    if subprocess.run([node, '-e', "require.resolve('@huggingface/transformers')"], capture_output=True).returncode:
        pytest.skip(
            'Node does not find transformers.js: ONNXRUNTIME_NODE_INSTALL=skip npm install '
            '@huggingface/transformers@4.3.0 in any folder, and name its node_modules in NODE_PATH')
    image = heldout / '3_three' / '1509.png'
    printed = subprocess.check_output([node, '-e', CLASSIFY, f'{folder.parent}/', folder.name, dtype, image], text=True)
    found = json.loads(printed.splitlines()[-1])
    assert len(found) == 10 and found[0]['label'] == 'three'
    assert found[0]['score'] == pytest.approx(0.903, abs=0.006)  # timm's; Node resizes in another way


@pytest.mark.parametrize('arguments', [dict(img_size=(56, 72)), dict(in_chans=1)])
def test_of_images_that_it_does_not_prepare(tmp_path, arguments):
    pytest.importorskip('onnxscript', reason='pip install t2t-timm[onnx]')
    with pytest.raises(UserError, match='transformers.js prepares square RGB images'):
        export_model(timm.create_model('test_t2t_vit', **arguments), tmp_path / 'model', 'transformers.js')
    assert not list(tmp_path.iterdir())
