"""What the tests of several commands read."""
import shutil

import pytest


@pytest.fixture
def embedded():
    """The embedded model, in evaluation mode."""
    import timm
    return timm.create_model('test_t2t_vit', pretrained=True).eval()


@pytest.fixture(scope='session')
def digits(heldout, tmp_path_factory):
    """A folder with 100 of the held-out digits, 000.png to 099.png, ten of each in order."""
    folder = tmp_path_factory.mktemp('digits')
    for i, file in enumerate(sorted(heldout.glob('*/*'))[::10]):
        shutil.copy(file, folder / f'{i:03}.png')
    return folder


@pytest.fixture(scope='session')
def onnx_file(tmp_path_factory):
    """The embedded model as an ONNX file."""
    import timm

    from t2t_timm.commands.export import export_model
    for name in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(name, reason='pip install t2t-timm[onnx]')
    model = timm.create_model('test_t2t_vit', pretrained=True)
    return export_model(model, tmp_path_factory.mktemp('onnx') / 'model.onnx').path
