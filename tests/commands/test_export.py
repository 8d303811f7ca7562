"""Exported models run outside of the module that made them, and a file appears only if it agrees with the model."""
import errno
import functools
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from t2t_timm.cli import main
from t2t_timm.commands import export, formats
from t2t_timm.commands.export import export_model
from t2t_timm.commands.formats import FORMATS, OPSET
from t2t_timm.commands.images import ImageReader
from t2t_timm.commands.quantize import SUBSET, Calibration, measure_agreement, quantize_onnx
from t2t_timm.digits import extract_heldout
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
def openvino():
    for name in ('onnx', 'onnxscript', 'nncf'):
        pytest.importorskip(name, reason='pip install t2t-timm[openvino]')
    return pytest.importorskip('openvino', reason='pip install t2t-timm[openvino]')


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """A folder with 100 of the held-out digits, and their classes."""
    whole = Path(extract_heldout(tmp_path_factory.mktemp('digits') / 'all'))
    folder = whole.parent / 'some'
    folder.mkdir()
    targets = []
    for i, file in enumerate(sorted(whole.glob('*/*'))[::10]):
        shutil.copy(file, folder / f'{i:03}{file.suffix}')
        targets.append(int(file.parent.name[0]))
    return folder, targets


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
            pytest.skip(f'{e} Install that torch to run this test.')
        raise


@pytest.fixture(scope='module')
def export_once(tmp_path_factory):
    """A function that exports a model to a format once, and gives the model and what export_model says."""
    make = functools.cache(lambda token_type, dynamic: make_model(token_type=token_type, dynamic_img_size=dynamic))

    @functools.cache
    def export_once(format, token_type, dynamic):
        model, suffix = make(token_type, dynamic), FORMATS[format].suffixes[0]
        return model, export_or_skip(model, tmp_path_factory.mktemp('export') / f'model{suffix}', format)

    return export_once


@pytest.mark.slow
@pytest.mark.parametrize('token_type', TOKEN_TYPES)
@pytest.mark.parametrize('dynamic', [False, True])
def test_onnx(onnxruntime, export_once, token_type, dynamic):
    import onnx
    model, done = export_once('onnx', token_type, dynamic)
    file = done.path
    assert done.max_diff < 1e-4 and done.size == os.path.getsize(file)
    assert [i.version for i in onnx.load(file).opset_import if i.domain == ''] == [OPSET]
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    shapes = [(1, 3, 56, 56), (3, 3, 56, 56), (5, 3, 56, 56)]
    for shape in shapes + ([(1, 3, 97, 64), (2, 3, 64, 160)] if dynamic else []):
        x = images(*shape)
        logits, = session.run(['logits'], {'x': x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(x), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize('token_type', TOKEN_TYPES)
@pytest.mark.parametrize('dynamic', [False, True])
def test_openvino(openvino, tmp_path, token_type, dynamic):
    model = make_model(token_type=token_type, dynamic_img_size=dynamic)
    done = export_model(model, tmp_path / 'model.xml', 'openvino')
    files = sorted(tmp_path.iterdir())
    assert [p.name for p in files] == ['model.bin', 'model.xml'] and done.size == sum(map(os.path.getsize, files))
    run = openvino.compile_model(str(tmp_path / 'model.xml'), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    for shape in [(1, 3, 56, 56), (3, 3, 56, 56)] + ([(1, 3, 97, 64), (2, 3, 64, 160)] if dynamic else []):
        x = images(*shape)
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(run([x.numpy()])['logits']), model(x), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # the exporter is deprecated
@pytest.mark.parametrize('opset', [17, 18, 20])
@pytest.mark.parametrize('token_type', TOKEN_TYPES + ('convolution',))
def test_older_exporter_of_torch(onnxruntime, tmp_path, token_type, opset):
    """What timm's onnx_export.py calls without --dynamo: any batch size, as of timm's ViTs."""
    import onnx
    model, file = make_model(token_type=token_type), str(tmp_path / 'model.onnx')
    axes = {'x': {0: 'batch'}, 'logits': {0: 'batch'}}
    torch.onnx.export(
        model, (images(2, 3, 56, 56),), file, dynamo=False, opset_version=opset, input_names=['x'],
        output_names=['logits'], dynamic_axes=axes)
    assert [i.version for i in onnx.load(file).opset_import] == [opset]
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    for batch_size in (2, 1, 5):
        x = images(batch_size, 3, 56, 56) * .01 + 2.2  # flat: the first soft split subtracts the centre of each patch
        with torch.no_grad():
            expected = model(x)
        logits, = session.run(['logits'], {'x': x.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize('opset', [16, 17, 18, 19, 23, 24])
@pytest.mark.parametrize('token_type', TOKEN_TYPES)
def test_other_opsets(onnxruntime, tmp_path, token_type, opset):
    import onnx
    model, file = make_model(token_type=token_type), tmp_path / 'model.onnx'
    assert export_model(model, file, opset=opset).max_diff < 1e-4
    assert [i.version for i in onnx.load(file).opset_import if i.domain == ''] == [opset]
    session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
    x = images(5, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(session.run(['logits'], {'x': x.numpy()})[0]), model(x), atol=1e-4, rtol=0)


def test_int8_of_a_file_that_does_not_name_its_modules(onnxruntime, export_once, tmp_path):
    import onnx
    model = onnx.load(export_once('onnx', 'performer', False)[1].path)
    for node in model.graph.node:
        del node.metadata_props[:]
    onnx.save(model, tmp_path / 'model.onnx')
    with pytest.raises(UserError, match='does not say which module its nodes are of'):
        quantize_onnx(tmp_path / 'model.onnx', tmp_path / 'int8.onnx')
    assert [p.name for p in tmp_path.iterdir()] == ['model.onnx']


@pytest.mark.slow
@pytest.mark.parametrize('format', ['onnx', 'openvino'])
def test_float16(request, tmp_path, digits, format):
    """Its weights are in float16, and the digits are classified as before."""
    tool = request.getfixturevalue('onnxruntime' if format == 'onnx' else 'openvino')
    model, (folder, _) = timm.create_model('test_t2t_vit', pretrained=True).eval(), digits
    file = tmp_path / ('model.onnx' if format == 'onnx' else 'model.xml')
    whole = export_model(model, file, format)
    done = export_model(model, file, format, dtype='float16')
    assert 1e-5 < done.max_diff < 2e-2 and done.size < 0.8 * whole.size
    x = torch.cat([ImageReader(model)(str(p)) for p in sorted(folder.iterdir())])
    if format == 'onnx':
        import onnx
        assert any(i.data_type == onnx.TensorProto.FLOAT16 for i in onnx.load(file).graph.initializer)
        session = tool.InferenceSession(str(file), providers=['CPUExecutionProvider'])
        logits, = session.run(['logits'], {'x': x.numpy()})
    else:
        logits = tool.compile_model(str(file), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})([x.numpy()])['logits']
    with torch.no_grad():
        expected = model(x)
    assert logits.dtype == 'float32'
    torch.testing.assert_close(torch.from_numpy(logits), expected, atol=5e-2, rtol=0)
    assert (torch.from_numpy(logits).argmax(1) == expected.argmax(1)).sum() >= 99


@pytest.mark.slow
@pytest.mark.parametrize('token_type', TOKEN_TYPES)
def test_executorch(tmp_path, token_type):
    pytest.importorskip('executorch', reason='pip install t2t-timm[executorch]')
    model, file = make_model(token_type=token_type), tmp_path / 'model.pte'
    done = export_model(model, file, 'executorch')
    assert done.max_diff < 1e-4 and done.size == os.path.getsize(file)
    x = images(1, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(FORMATS['executorch'].run(file)(x), model(x), atol=1e-4, rtol=0)


def test_onnx_has_no_sizes_of_what_is_between(onnxruntime, export_once):
    """tract refuses names of free sizes there if the batch is fixed."""
    import onnx
    assert not onnx.load(export_once('onnx', 'performer', False)[1].path).graph.value_info


@pytest.mark.slow
@pytest.mark.parametrize('token_type', TOKEN_TYPES)
def test_openvino_reads_a_trace(openvino, token_type):
    model = make_model(token_type=token_type)
    run = openvino.compile_model(
        openvino.convert_model(model, example_input=images(2, 3, 56, 56)), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    x = images(3, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(run([x.numpy()])[0]), model(x), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize('format', ['onnx', 'openvino'])
def test_int8(request, tmp_path, digits, format):
    """What the file gives, run apart from the exporter, is what was printed, and the digits are still classified."""
    tool = request.getfixturevalue('onnxruntime' if format == 'onnx' else 'openvino')
    folder, targets = digits
    model = timm.create_model('test_t2t_vit', pretrained=True).eval()
    file = tmp_path / ('model.onnx' if format == 'onnx' else 'model.xml')
    done = export_model(model, file, format, 'int8', folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == (
        ['model.onnx'] if format == 'onnx' else ['model.bin', 'model.xml'])
    read = ImageReader(model)
    x = torch.cat([read(str(p)) for p in sorted(folder.iterdir())])
    if format == 'onnx':
        session = tool.InferenceSession(str(file), providers=['CPUExecutionProvider'])
        logits = [session.run(['logits'], {'x': part.numpy()})[0] for part in x.split(1)]
    else:
        run = tool.compile_model(str(file), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
        logits = [run([part.numpy()])['logits'].copy() for part in x.split(1)]
    logits = torch.cat([torch.from_numpy(part) for part in logits])
    with torch.no_grad():
        expected = model(x)
    assert done.agreement.images == 100
    assert done.agreement.same == (logits.argmax(1) == expected.argmax(1)).sum() >= 98
    diff = (logits.softmax(1) - expected.softmax(1)).abs().max().item()
    assert done.agreement.max_diff == pytest.approx(diff, abs=1e-3) and 1e-4 < diff < 0.3
    assert (logits.argmax(1) == torch.tensor(targets)).sum() >= 96
    assert f'same class as the float model for {done.agreement.same:.1f} % of 100 images' in str(done)


@pytest.mark.parametrize('token_type', TOKEN_TYPES + ('convolution',))
def test_torch_export_of_one_shape(token_type):
    model, x = make_model(token_type=token_type), images(2, 3, 56, 56)
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize('format', ['export', 'torchscript'])
@pytest.mark.parametrize('token_type', TOKEN_TYPES)
@pytest.mark.parametrize('dynamic', [False, True])
def test_any_batch_and_size(export_once, format, token_type, dynamic):
    model, done = export_once(format, token_type, dynamic)
    assert done.max_diff < 1e-4
    run = torch.export.load(done.path).module() if format == 'export' else torch.jit.load(done.path)
    for shape in [(1, 3, 56, 56), (3, 3, 56, 56)] + ([(1, 3, 97, 64), (2, 3, 64, 160)] if dynamic else []):
        x = images(*shape)
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), atol=1e-4, rtol=0)


def test_aoti_in_a_full_temporary_folder_is_one_sentence(tmp_path, monkeypatch):
    compiler = pytest.importorskip('torch._inductor.cpp_builder', reason='install a newer torch')
    monkeypatch.setattr(compiler, 'get_cpp_compiler', lambda: 'g++')

    def compile(*args, **kwargs):  # as torch tells of it
        raise RuntimeError(f'OSError: {OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))}')
    monkeypatch.setattr('torch._inductor.aoti_compile_and_package', compile, raising=False)
    with pytest.raises(UserError, match=f'^{re.escape(tempfile.gettempdir())} has no room left for .* in TMPDIR.$'):
        export_model(make_model(), tmp_path / 'a.pt2', 'aoti')
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_aoti(tmp_path):
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip('AOTInductor needs a C++ compiler: install gcc, clang or MSVC')
    model = make_model(depth=1)
    file = tmp_path / 'model.pt2'
    assert export_model(model, file, 'aoti').max_diff < 1e-4
    run, x = torch._inductor.aoti_load_package(str(file)), images(4, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(run(x), model(x), atol=1e-4, rtol=0)


def test_other_sizes_from_the_command_line(tmp_path, capsys):
    file = tmp_path / 'model.pt'
    command = ['export', 'test_t2t_vit', '--untrained', '--format', 'torchscript', '--out', str(file)]
    assert main(command + ['--img-size', '40', '72']) == 0
    assert '1x3x40x72' in capsys.readouterr().out
    assert torch.jit.load(file)(images(3, 3, 40, 72)).shape == (3, 10)


def replace(monkeypatch, format, **what):
    monkeypatch.setitem(FORMATS, format, FORMATS[format]._replace(**what))


SCRIPT = ['--format', 'torchscript']  # needs no further package


class TestNothingIsWritten:
    def test_of_a_model_that_differs(self, tmp_path, monkeypatch):
        run = FORMATS['torchscript'].run
        replace(monkeypatch, 'torchscript', run=lambda file: lambda x: run(file)(x) + 2e-3)
        (tmp_path / 'model.pt').write_text('before')
        with pytest.raises(UserError, match='differs from the model by 2.0e-03'):
            export_model(make_model(), tmp_path / 'model.pt', 'torchscript')
        assert [p.name for p in tmp_path.iterdir()] == ['model.pt']
        assert (tmp_path / 'model.pt').read_text() == 'before'

    def test_of_a_model_that_gives_nan(self, tmp_path, monkeypatch):
        replace(monkeypatch, 'torchscript', run=lambda file: lambda x: torch.full((len(x), 10), torch.nan))
        with pytest.raises(UserError, match='differs from the model by nan'):
            export_model(make_model(), tmp_path / 'model.pt', 'torchscript')
        assert not list(tmp_path.iterdir())

    def test_by_an_exporter_that_is_too_old(self, tmp_path, capsys, monkeypatch):
        def write(source, file):
            raise TypeError('what it says\nand much more')
        replace(monkeypatch, 'torchscript', write=write)
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
        (['--quantize', 'int4', '--calibration', 'EMPTY'], "Unknown quantization 'int4': use int8."),
        (['--quantize', 'int8'], '--quantize int8 needs --calibration FOLDER, a folder with images.'),
        (['--calibration', 'EMPTY'], '--calibration is for --quantize int8.'),
        (['--quantize', 'int8', '--calibration', 'EMPTY'], 'There are no images in '),
        (['--quantize', 'int8', '--calibration', 'nowhere'], 'There is no folder nowhere with images'),
        (['--quantize', 'int8', '--calibration', 'EMPTY', '--format', 'torchscript'],
         '--quantize int8 is for the formats onnx, openvino and transformers.js, not for torchscript.'),
        (['--dtype', 'bfloat16'], "Unknown dtype 'bfloat16': use float32 or float16."),
        (['--dtype', 'float16', '--format', 'aoti'], '--dtype float16 is for the formats onnx and openvino, not for'),
        (['--dtype', 'float16', '--quantize', 'int8', '--calibration', 'EMPTY'], 'make two different files'),
        (['--dtype', 'float16', '--opset', '17'], '--dtype float16 needs --opset 18 or more, not 17.'),
        (['--format', 'executorch', '--dynamic'], 'A file of executorch is for one image size: leave out --dynamic.'),
        (['--format', 'openvino'], 'model.onnx ends in .onnx, but the file is a .xml.'),
        (['--opset', '15'], '--opset takes 16 to 24, not 15.'),
        (['--opset', '17', '--format', 'torchscript'], '--opset is for the format onnx, not for torchscript.'),
        (['--opset', '17', '--dynamic'], 'A model for images of any size (--dynamic) needs --opset 18 or more, not 17'),
        (['--opset', '17', '--quantize', 'int8', '--calibration', 'EMPTY'],
         '--quantize int8 needs --opset 18 or more, not 17.'),
    ])
    def test_of_arguments_that_do_not_go_together(self, tmp_path, capsys, arguments, message):
        empty, out = tmp_path / 'empty', tmp_path / 'out'
        empty.mkdir()
        out.mkdir()
        arguments = [str(empty) if a == 'EMPTY' else a for a in arguments]
        assert main(['export', 'test_t2t_vit', '--untrained', *arguments, '--out', str(out / 'model.onnx')]) == 1
        err = capsys.readouterr().err
        assert message in err and len(err.splitlines()) == 1
        assert not list(out.iterdir())

    def test_with_no_image_that_can_be_read(self, onnxruntime, tmp_path, monkeypatch):
        out = tmp_path / 'out'
        out.mkdir()
        (tmp_path / 'broken.png').write_text('no image')
        with pytest.raises(UserError, match='None of the images in .* can be read'):
            export_model(make_model(), out / 'model.onnx', 'onnx', 'int8', tmp_path)
        assert not list(out.iterdir())

    def test_over_the_weights_of_something_else(self, tmp_path):
        (tmp_path / 'model.bin').write_text('before')
        with pytest.raises(UserError, match='exists and is not the weights of model.xml'):
            export_model(make_model(), tmp_path / 'model.xml', 'openvino')
        assert [p.read_text() for p in tmp_path.iterdir()] == ['before']

    def test_of_a_pair_that_differs(self, tmp_path, monkeypatch):
        def write(source, file):
            for name in (file, file.with_suffix('.bin')):
                name.write_text('new')
        replace(monkeypatch, 'openvino', write=write, run=lambda file: lambda x: torch.ones(len(x), 10), packages=())
        for name in ('model.xml', 'model.bin'):
            (tmp_path / name).write_text('before')
        with pytest.raises(UserError, match='differs from the model'):
            export_model(make_model(), tmp_path / 'model.xml', 'openvino')
        assert [p.read_text() for p in tmp_path.iterdir()] == ['before', 'before']

    @pytest.mark.parametrize('arguments, message', [
        (['test_t2t_vit', '--untrained', '--format', 'tflite'], "Unknown format 'tflite': use one of onnx, openvino, "),
        ([*SCRIPT, 'test_t2t_vat'], "There is no architecture 'test_t2t_vat'"),
        ([*SCRIPT, 'resnet18'], 'resnet18 is not a T2T-ViT'),
        ([*SCRIPT, 't2t_vit_dense'], 't2t_vit_dense has no pretrained weights'),
        ([*SCRIPT, 'test_t2t_vit', '--untrained', '--img-size', '2'], '--img-size takes a height and a width'),
        ([*SCRIPT, 'test_t2t_vit', '--untrained', '--img-size', '56', '56', '3'], '--img-size takes a height and a'),
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

    @pytest.mark.parametrize('arguments, suffix, packages', [
        (['onnx'], '.onnx', 'onnx onnxscript onnxruntime'),
        (['openvino'], '.xml', 'openvino onnx onnxscript'),
        (['openvino', '--quantize', 'int8', '--calibration', 'IMAGES'], '.xml', 'openvino onnx onnxscript nncf'),
        (['executorch'], '.pte', 'executorch'),
        (['transformers.js'], '', 'onnx onnxscript onnxruntime'),
    ])
    def test_without_the_extra(self, tmp_path, capsys, monkeypatch, arguments, suffix, packages):
        """Said before weights are loaded: there is no such model."""
        monkeypatch.setattr(export, 'find_spec', lambda name: None)
        (tmp_path / 'images').mkdir()
        Image.new('L', (8, 8)).save(tmp_path / 'images' / 'a.png')
        arguments = [str(tmp_path / 'images') if a == 'IMAGES' else a for a in arguments]
        out = str(tmp_path / f'model{suffix}')
        assert main(['export', 'no_model', '--out', out, '--format', *arguments]) == 1
        assert capsys.readouterr().err == (
            f't2t-timm export: The format {arguments[0]} needs more packages: pip install {packages}\n')
        assert [p.name for p in tmp_path.iterdir()] == ['images']

    def test_over_a_folder_that_is_not_empty(self, tmp_path):
        (tmp_path / 'model').touch()
        with pytest.raises(UserError, match='exists and is not empty'):
            export_model(make_model(), tmp_path, 'transformers.js')
        assert [p.name for p in tmp_path.iterdir()] == ['model']

    @pytest.mark.skipif(os.name == 'nt', reason='Windows has no signals: run it on Linux or macOS')
    def test_of_a_file_that_ends_its_runtime(self, tmp_path, monkeypatch):
        def write(source, file):
            file.touch()
        monkeypatch.setattr(formats, '_RUN_PTE', 'import os, signal\nos.kill(os.getpid(), signal.SIGKILL)')
        replace(monkeypatch, 'executorch', write=write, packages=())
        with pytest.raises(UserError, match='The runtime of ExecuTorch cannot run the file, it ended by SIGKILL'):
            export_model(make_model(), tmp_path / 'model.pte', 'executorch')
        assert not list(tmp_path.iterdir())


def test_images_that_cannot_be_read_are_left_out_before_the_export(tmp_path, caplog):
    model = timm.create_model('test_t2t_vit').eval()
    for name in ('a.png', 'c.png'):
        Image.new('L', (28, 28)).save(tmp_path / name)
    (tmp_path / 'b.png').write_bytes((tmp_path / 'a.png').read_bytes()[:40])
    (tmp_path / 'notes.txt').touch()
    assert [file for file, _ in Calibration(tmp_path, model)] == [str(tmp_path / 'a.png'), str(tmp_path / 'c.png')]
    skipped, left_out = caplog.messages
    assert skipped == f'Skipped 1 that has no extension of an image: {tmp_path / "notes.txt"}.'
    assert left_out.startswith(f'Left out: {tmp_path / "b.png"} cannot be read as an image: ')
    for name in ('a.png', 'c.png'):
        (tmp_path / name).write_text('text')
    with pytest.raises(UserError, match='None of the images in .* can be read'):
        Calibration(tmp_path, model)


def test_each_image_is_decoded_once(tmp_path, monkeypatch):
    """Beyond the ones that are kept, too; and the agreement counts those that could be read."""
    decoded = []
    pixels = ImageReader.pixels
    monkeypatch.setattr(ImageReader, 'pixels', lambda self, file: decoded.append(file) or pixels(self, file))
    for i in range(SUBSET + 5):
        Image.new('L', (28, 28), i % 256).save(tmp_path / f'{i:03}.png')
    (tmp_path / '100.png').write_text('text')
    (tmp_path / '101.png').write_text('text')
    model = make_model(depth=1)
    calibration = Calibration(tmp_path, model)
    assert len(calibration.subset()) < SUBSET
    with torch.no_grad():
        agreement = measure_agreement(model, model, calibration)
    assert agreement == (SUBSET + 3, SUBSET + 3, 0)
    assert sorted(decoded) == [str(tmp_path / f'{i:03}.png') for i in range(SUBSET + 5)]
