"""Exported models run outside of the module that made them, and a file appears only if it agrees with the model."""
import os

import pytest
import timm
import torch

from t2t_timm.cli import main
from t2t_timm.commands import export
from t2t_timm.commands.export import OPSET, export_model
from t2t_timm.errors import UserError

TOKEN_TYPES = ('performer', 'transformer')


def make_model(**kwargs):
    """A model whose logits are as large as a trained one's, of one block as all but the last and the last."""
    torch.manual_seed(0)
    model = timm.create_model('test_t2t_vit', **dict(dict(depth=2), **kwargs)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=p.shape[-1] ** -0.5)
    return model


@pytest.fixture
def onnxruntime():
    for name in ('onnx', 'onnxscript'):
        pytest.importorskip(name, reason='pip install t2t-timm[onnx]')
    return pytest.importorskip('onnxruntime', reason='pip install t2t-timm[onnx]')


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def export_or_skip(model, file, format):
    """What export_model says, or a skip where this torch's exporter is too old."""
    try:
        return export_model(model, file, format)
    except UserError as e:
        if torch.__version__ < export.TESTED_TORCH and 'cannot export' in str(e):
            assert not file.exists()
            pytest.skip(str(e))
        raise


@pytest.mark.slow
@pytest.mark.parametrize('token_type', TOKEN_TYPES)
@pytest.mark.parametrize('dynamic', [False, True])
def test_onnx(onnxruntime, tmp_path, token_type, dynamic):
    import onnx
    model = make_model(token_type=token_type, dynamic_img_size=dynamic)
    file = tmp_path / 'model.onnx'
    done = export_or_skip(model, file, 'onnx')
    assert done.max_diff < 1e-4 and done.size == os.path.getsize(file)
    assert [i.version for i in onnx.load(file).opset_import if i.domain == ''] == [OPSET]
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    shapes = [(1, 3, 56, 56), (3, 3, 56, 56), (5, 3, 56, 56)]
    for shape in shapes + ([(1, 3, 97, 64), (2, 3, 64, 160)] if dynamic else []):
        x = images(*shape)
        logits, = session.run(['logits'], {'x': x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize('token_type', TOKEN_TYPES + ('convolution',))
def test_torch_export_of_one_shape(token_type):
    model, x = make_model(token_type=token_type), images(2, 3, 56, 56)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize('format', ['export', 'torchscript'])
@pytest.mark.parametrize('token_type', TOKEN_TYPES)
@pytest.mark.parametrize('dynamic', [False, True])
def test_any_batch_and_size(tmp_path, format, token_type, dynamic):
    model = make_model(token_type=token_type, dynamic_img_size=dynamic)
    file = tmp_path / ('model.pt2' if format == 'export' else 'model.pt')
    assert export_or_skip(model, file, format).max_diff < 1e-4
    run = torch.export.load(file).module() if format == 'export' else torch.jit.load(file)
    for shape in [(1, 3, 56, 56), (3, 3, 56, 56)] + ([(1, 3, 97, 64), (2, 3, 64, 160)] if dynamic else []):
        x = images(*shape)
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_aoti(tmp_path):
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip('AOTInductor needs a C++ compiler')
    model = make_model(depth=1)
    file = tmp_path / 'model.pt2'
    assert export_model(model, file, 'aoti').max_diff < 1e-4
    run, x = torch._inductor.aoti_load_package(str(file)), images(4, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), atol=1e-4, rtol=0)


def test_other_sizes_from_the_command_line(tmp_path, capsys):
    file = tmp_path / 'model.pt2'
    command = ['export', 'test_t2t_vit', '--untrained', '--format', 'export', '--out', str(file)]
    assert main(command + ['--img-size', '40', '72']) == 0
    assert '1x3x40x72' in capsys.readouterr().out
    assert torch.export.load(file).module()(images(3, 3, 40, 72)).shape == (3, 10)


class TestNothingIsWritten:
    def test_of_a_model_that_differs(self, tmp_path, monkeypatch):
        def write(model, x, file):
            run = export._write_torchscript(model, x, file)
            return lambda x: run(x) + 2e-3
        monkeypatch.setitem(export.FORMATS, 'torchscript', (write, '.pt'))
        (tmp_path / 'model.pt').write_text('before')
        with pytest.raises(UserError, match='differs from the model by 2.0e-03'):
            export_model(make_model(), tmp_path / 'model.pt', 'torchscript')
        assert [p.name for p in tmp_path.iterdir()] == ['model.pt']
        assert (tmp_path / 'model.pt').read_text() == 'before'

    def test_of_a_model_that_gives_nan(self, tmp_path, monkeypatch):
        monkeypatch.setitem(export.FORMATS, 'torchscript', (lambda model, x, file: lambda x: model(x) * torch.nan, ''))
        with pytest.raises(UserError, match='differs from the model by nan'):
            export_model(make_model(), tmp_path / 'model.pt', 'torchscript')
        assert not list(tmp_path.iterdir())

    def test_by_an_exporter_that_is_too_old(self, tmp_path, capsys, monkeypatch):
        def write(model, x, file):
            raise TypeError('what it says\nand much more')
        monkeypatch.setitem(export.FORMATS, 'torchscript', (write, '.pt'))
        command = ['export', 'test_t2t_vit', '--untrained', '--format', 'torchscript', '--out', str(tmp_path / 'm.pt')]
        monkeypatch.setattr(export, 'TESTED_TORCH', '999')
        assert main(command + ['--dynamic']) == 1
        assert capsys.readouterr().err.splitlines()[-1] == (
            f't2t-timm export: torch {torch.__version__} cannot export this model as torchscript for images of any '
            'size (what it says); torch 999 can. Nothing was written.')
        assert not list(tmp_path.iterdir())
        monkeypatch.setattr(export, 'TESTED_TORCH', '1')
        with pytest.raises(TypeError):
            main(command)

    @pytest.mark.parametrize('arguments, message', [
        (['test_t2t_vit', '--untrained', '--format', 'tflite'], "Unknown format 'tflite': use one of onnx, export, "),
        (['test_t2t_vat'], "timm does not know the model 'test_t2t_vat'"),
        (['resnet18'], 'resnet18 is not a T2T-ViT'),
        (['t2t_vit_dense'], 'No pretrained weights exist for t2t_vit_dense'),
        (['test_t2t_vit', '--untrained', '--img-size', '2'], '--img-size takes a height and a width'),
        (['test_t2t_vit', '--untrained', '--img-size', '56', '56', '3'], '--img-size takes a height and a width'),
    ])
    def test_of_a_mistake(self, tmp_path, capsys, arguments, message):
        assert main(['export', *arguments, '--out', str(tmp_path / 'model')]) == 1
        err = capsys.readouterr().err
        assert message in err and 'Traceback' not in err and len(err.splitlines()) <= 2
        assert not list(tmp_path.iterdir())

    def test_without_a_folder(self, tmp_path, capsys):
        out = tmp_path / 'nowhere' / 'model.onnx'
        assert main(['export', 'test_t2t_vit', '--untrained', '--out', str(out)]) == 1
        assert 'There is no folder' in capsys.readouterr().err

    def test_without_the_extra(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(export, 'find_spec', lambda name: None)
        assert main(['export', 'test_t2t_vit', '--untrained', '--out', str(tmp_path / 'model.onnx')]) == 1
        assert 'pip install t2t-timm[onnx]' in capsys.readouterr().err
        assert not list(tmp_path.iterdir())
