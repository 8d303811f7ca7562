"""Exported models run outside of the module that made them, and a file appears only if it agrees with the model."""
import errno
import os
import re
import subprocess
import tempfile

import pytest
import timm
import torch
from PIL import Image

from t2t_timm.cli import main
from t2t_timm.commands import export, formats
from t2t_timm.commands.export import export_model
from t2t_timm.commands.formats import FORMATS
from t2t_timm.commands.images import ImageReader, find_images
from t2t_timm.commands.quantize import SUBSET, Calibration, measure_agreement, quantize_onnx
from t2t_timm.errors import UserError

PACKAGES = {
    'onnx': ('onnx', 'onnxscript', 'onnxruntime'), 'openvino': ('openvino', 'nncf', 'onnx', 'onnxscript'),
    'executorch': ('executorch',)}


def make_model(**kwargs):
    """A model whose logits are as large as a trained one's, of one block as all but the last and the last."""
    torch.manual_seed(0)
    model = timm.create_model('test_t2t_vit', **dict(dict(depth=2), **kwargs)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(std=p.shape[-1] ** -0.5)
    return model


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def skip_without(format):
    for name in PACKAGES.get(format, ()):
        pytest.importorskip(name, reason=f'pip install t2t-timm[{format}]')
    if format == 'aoti':
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            pytest.skip('AOTInductor needs a C++ compiler: install gcc, clang or MSVC')


def load(format, file):
    """A function that gives the logits of images by the format's own runtime."""
    if format == 'onnx':
        import onnxruntime
        session = onnxruntime.InferenceSession(str(file), providers=['CPUExecutionProvider'])
        return lambda x: torch.from_numpy(session.run(['logits'], {'x': x.numpy()})[0])
    if format == 'openvino':
        import openvino
        compiled = openvino.compile_model(str(file), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
        return lambda x: torch.from_numpy(compiled([x.numpy()])['logits'].copy())
    if format == 'aoti':
        return torch._inductor.aoti_load_package(str(file))
    if format == 'executorch':
        return FORMATS['executorch'].run(file)
    return torch.export.load(file).module() if format == 'export' else torch.jit.load(file)


def slow(*case):
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.parametrize('format, token_type, dynamic, opset', [
    ('torchscript', 'performer', True, None), ('torchscript', 'transformer', False, None),
    ('export', 'performer', True, None), ('export', 'transformer', True, None), ('export', 'performer', False, None),
    # the default, torch's older exporter, the newer one's own, and attention as one operator
    slow('onnx', 'performer', True, None), slow('onnx', 'transformer', True, None),
    slow('onnx', 'transformer', False, 16), slow('onnx', 'performer', False, 18),
    slow('onnx', 'transformer', False, 24),
    slow('openvino', 'performer', True, None), slow('openvino', 'transformer', False, None),
    slow('executorch', 'performer', False, None), slow('executorch', 'transformer', False, None),
    slow('aoti', 'performer', False, None),
])
def test_any_batch_and_size(tmp_path, format, token_type, dynamic, opset):
    skip_without(format)
    depth = 1 if format == 'aoti' else 2  # whose compiler takes long
    model = make_model(token_type=token_type, dynamic_img_size=dynamic, depth=depth)
    file = tmp_path / f'model{FORMATS[format].suffixes[0]}'
    try:
        done = export_model(model, file, format, opset=opset)
    except UserError as e:
        if torch.__version__ < export.TESTED_TORCH and 'cannot export' in str(e):
            assert not file.exists()
            pytest.skip(f'{e} Install that torch to run this test.')
        raise
    written = sorted(tmp_path.iterdir())
    assert [p.name for p in written] == (['model.bin', 'model.xml'] if format == 'openvino' else [file.name])
    assert done.max_diff < 1e-4 and done.size == sum(map(os.path.getsize, written))
    if format == 'onnx':
        import onnx
        assert [i.version for i in onnx.load(file).opset_import if i.domain == ''] == [opset or formats.OPSET]
    run, shapes = load(format, file), [(1, 56, 56), (3, 56, 56), (5, 56, 56)]
    for batch, *size in (shapes[:1] if format == 'executorch' else shapes) + [(1, 97, 64), (2, 64, 160)] * dynamic:
        x = images(batch, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # the exporter is deprecated
@pytest.mark.parametrize('token_type, opset, fused', [
    ('performer', 20, True), ('performer', 17, False), ('convolution', 17, True),
])
def test_older_exporter_of_torch(tmp_path, token_type, opset, fused):
    """What timm's onnx_export.py calls without --dynamo: any batch size, as of timm's ViTs."""
    skip_without('onnx')
    model, file = make_model(token_type=token_type), str(tmp_path / 'model.onnx')
    if not fused:
        model.patch_embed.attention1.register_forward_hook(lambda *args: None)
        model.patch_embed.attention1.norm1.register_forward_hook(lambda *args: None)
    torch.onnx.export(
        model, (images(2, 3, 56, 56),), file, dynamo=False, opset_version=opset, input_names=['x'],
        output_names=['logits'], dynamic_axes={'x': {0: 'batch'}, 'logits': {0: 'batch'}})
    for batch_size in (2, 1, 5):
        x = images(batch_size, 3, 56, 56) * .01 + 2.2  # flat: the first soft split subtracts the centre of each patch
        with torch.no_grad():
            torch.testing.assert_close(load('onnx', file)(x), model(x), atol=1e-4, rtol=0)


def test_a_model_that_was_made_in_inference_mode_and_for_training(tmp_path):
    with torch.inference_mode():
        model = timm.create_model('test_t2t_vit', depth=1).half()
    assert export_model(model, tmp_path / 'model.pt2', 'export').max_diff < 1e-4
    assert model.training and model.head.weight.dtype == torch.float16


def test_int8_of_a_file_that_does_not_name_its_modules(onnx_file, tmp_path):
    import onnx
    model = onnx.load(onnx_file)
    for node in model.graph.node:
        del node.metadata_props[:]
    onnx.save(model, tmp_path / 'model.onnx')
    with pytest.raises(UserError, match='does not say which module its nodes are of'):
        quantize_onnx(tmp_path / 'model.onnx', tmp_path / 'int8.onnx')
    assert [p.name for p in tmp_path.iterdir()] == ['model.onnx']


def test_onnx_has_no_sizes_of_what_is_between(onnx_file):
    """tract refuses names of free sizes there if the batch is fixed."""
    import onnx
    assert not onnx.load(onnx_file).graph.value_info


@pytest.mark.slow
@pytest.mark.parametrize('format', ['onnx', 'openvino'])
def test_float16(tmp_path, embedded, digits, format):
    """Its weights are in float16, and the digits are classified as before."""
    skip_without(format)
    file = tmp_path / f'model{FORMATS[format].suffixes[0]}'
    done = export_model(embedded, file, format, dtype='float16')
    assert 1e-5 < done.max_diff < 2e-2 and done.size < 4 * sum(p.numel() for p in embedded.parameters())
    x = torch.cat([ImageReader(embedded)(str(p)) for p in sorted(digits.iterdir())])
    with torch.no_grad():
        expected, logits = embedded(x), load(format, file)(x)
    torch.testing.assert_close(logits, expected, atol=5e-2, rtol=0)
    assert (logits.argmax(1) == expected.argmax(1)).sum() >= 99


@pytest.mark.slow
@pytest.mark.parametrize('format', ['onnx', 'openvino'])
def test_int8(tmp_path, embedded, digits, format):
    """What the file gives, run apart from the exporter, is what was printed, and the digits are still classified."""
    skip_without(format)
    file = tmp_path / f'model{FORMATS[format].suffixes[0]}'
    done = export_model(embedded, file, format, 'int8', digits)
    assert sorted(p.name for p in tmp_path.iterdir()) == (
        ['model.onnx'] if format == 'onnx' else ['model.bin', 'model.xml'])
    if format == 'onnx':  # the Performer's maps of 147 values stay in float32
        import onnx
        weights = {w.data_type: w.dims for w in onnx.load(file).graph.initializer if 147 in w.dims}
        assert list(weights) == [onnx.TensorProto.FLOAT]
    x = torch.cat([ImageReader(embedded)(str(p)) for p in sorted(digits.iterdir())])
    run = load(format, file)
    with torch.no_grad():
        expected, logits = embedded(x), torch.cat([run(part) for part in x.split(1)])
    assert done.agreement.images == 100
    assert done.agreement.same == (logits.argmax(1) == expected.argmax(1)).sum() >= 98
    diff = (logits.softmax(1) - expected.softmax(1)).abs().max().item()
    assert done.agreement.max_diff == pytest.approx(diff, abs=1e-3) and 1e-4 < diff < 0.3
    assert (logits.argmax(1) == torch.arange(10).repeat_interleave(10)).sum() >= 96
    assert f'same class as the float model for {done.agreement.same:.1f} % of 100 images' in str(done)


@pytest.mark.slow
@pytest.mark.parametrize('token_type', ['performer', 'transformer'])
def test_openvino_reads_a_trace(token_type):
    skip_without('openvino')
    import openvino
    model = make_model(token_type=token_type)
    run = openvino.compile_model(
        openvino.convert_model(model, example_input=images(2, 3, 56, 56)), 'CPU', {'INFERENCE_PRECISION_HINT': 'f32'})
    x = images(3, 3, 56, 56)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(run([x.numpy()])[0]), model(x), atol=1e-4, rtol=0)


def test_aoti_in_a_full_temporary_folder_is_one_sentence(tmp_path, monkeypatch):
    compiler = pytest.importorskip('torch._inductor.cpp_builder', reason='install a newer torch')
    monkeypatch.setattr(compiler, 'get_cpp_compiler', lambda: 'g++')

    def compile(*args, **kwargs):  # as torch tells of it
        raise RuntimeError(f'OSError: {OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))}')
    monkeypatch.setattr('torch._inductor.aoti_compile_and_package', compile, raising=False)
    with pytest.raises(UserError, match=f'^{re.escape(tempfile.gettempdir())} has no room left for .* in TMPDIR.$'):
        export_model(make_model(), tmp_path / 'a.pt2', 'aoti')
    assert not list(tmp_path.iterdir())


def test_other_sizes_from_the_command_line(tmp_path, capsys):
    file = tmp_path / 'model.pt'
    command = ['export', 'test_t2t_vit', '--untrained', '--format', 'torchscript', '--out', str(file)]
    assert main(command + ['--img-size', '40', '72']) == 0
    assert '1x3x40x72' in capsys.readouterr().out
    assert torch.jit.load(file)(images(3, 3, 40, 72)).shape == (3, 10)


class TestNothingIsWritten:
    @pytest.fixture
    def out(self, tmp_path):
        """The folder to write to, which has to be left as it is found."""
        (tmp_path / 'out').mkdir()
        return tmp_path / 'out'

    @pytest.fixture
    def replace(self, monkeypatch):
        """A function that replaces parts of a format."""
        return lambda format, **what: monkeypatch.setitem(FORMATS, format, FORMATS[format]._replace(**what))

    @pytest.mark.parametrize('wrong, words', [(2e-3, '2.0e-03'), (torch.nan, 'nan')])
    def test_of_a_model_that_differs(self, out, replace, wrong, words):
        run = FORMATS['torchscript'].run
        replace('torchscript', run=lambda file: lambda x: run(file)(x) + wrong)
        (out / 'model.pt').write_text('before')
        with pytest.raises(UserError, match=f'differs from the model by {words}'):
            export_model(make_model(), out / 'model.pt', 'torchscript')
        assert [p.read_text() for p in out.iterdir()] == ['before']

    def test_by_an_exporter_that_is_too_old(self, out, capsys, monkeypatch, replace):
        def write(source, file):
            raise TypeError('what it says\nand much more')
        replace('torchscript', write=write)
        command = ['export', 'test_t2t_vit', '--untrained', '--format', 'torchscript', '--out', str(out / 'm.pt')]
        monkeypatch.setattr(export, 'TESTED_TORCH', '999')
        assert main(command + ['--dynamic']) == 1
        assert capsys.readouterr().err.splitlines()[-1] == (
            f't2t-timm export: torch {torch.__version__} cannot export this model as torchscript for images of any '
            'size (what it says); torch 999 can. Nothing was written.')
        assert not list(out.iterdir())
        monkeypatch.setattr(export, 'TESTED_TORCH', '1')
        with pytest.raises(TypeError):
            main(command)

    @pytest.mark.parametrize('arguments, message', [
        (['--quantize', 'int4', '--calibration', 'empty'], "Unknown quantization 'int4': use int8."),
        (['--quantize', 'int8'], '--quantize int8 needs --calibration FOLDER, a folder with images.'),
        (['--calibration', 'empty'], '--calibration is for --quantize int8.'),
        (['--quantize', 'int8', '--calibration', 'empty'], 'FOLDER, a folder with images, not empty.'),
        (['--quantize', 'int8', '--calibration', 'nowhere'], 'FOLDER, a folder with images, not nowhere.'),
        (['--quantize', 'int8', '--calibration', 'empty', '--format', 'torchscript'],
         '--quantize int8 is for onnx, openvino, transformers.js, not for torchscript.'),
        (['--dtype', 'bfloat16'], "Unknown dtype 'bfloat16': use float32 or float16."),
        (['--dtype', 'float16', '--format', 'aoti'], '--dtype float16 is for onnx, openvino, not for'),
        (['--dtype', 'float16', '--quantize', 'int8', '--calibration', 'empty'], 'make two different files'),
        (['--dtype', 'float16', '--opset', '17'], 'for int8, float16 and images of any size 18 to 24, not 17.'),
        (['--format', 'executorch', '--dynamic'], 'A file of executorch is for one image size: leave out --dynamic.'),
        (['--format', 'openvino'], 'model.onnx ends in .onnx, but the file is a .xml.'),
        (['--format', 'torchscript'], 'model.onnx ends in .onnx, but the file is a .pt.'),
        (['--format', 'tflite'], "Unknown format 'tflite': use one of onnx, openvino, "),
        (['--out', 'nowhere/a.onnx'], 'There is no folder nowhere to write a.onnx to.'),
        (['--opset', '15'], '--opset takes 16 to 24, for int8, float16 and images of any size 18 to 24, not 15.'),
        (['--opset', '17', '--format', 'torchscript'], '--opset is for onnx, not for torchscript.'),
        (['--opset', '17', '--dynamic'], 'any size 18 to 24, not 17.'),
        (['--opset', '17', '--quantize', 'int8', '--calibration', 'empty'], 'any size 18 to 24, not 17.'),
    ])
    def test_of_arguments_that_do_not_go_together(self, out, tmp_path, capsys, monkeypatch, arguments, message):
        """Said before weights are loaded: there is no such model."""
        monkeypatch.chdir(tmp_path)
        (tmp_path / 'empty').mkdir()
        assert main(['export', 'no_model', '--out', str(out / 'model.onnx'), *arguments]) == 1
        err = capsys.readouterr().err
        assert message in err and len(err.splitlines()) == 1
        assert not list(out.iterdir())

    @pytest.mark.parametrize('arguments, message', [
        (['t2t_vit_dense'], 't2t_vit_dense has no pretrained weights'),
        (['test_t2t_vit', '--untrained', '--img-size', '2'], '--img-size takes a height and a width'),
        (['test_t2t_vit', '--untrained', '--img-size', '56', '56', '3'], '--img-size takes a height and a'),
    ])
    def test_of_a_mistake(self, out, capsys, arguments, message):
        assert main(['export', *arguments, '--format', 'torchscript', '--out', str(out / 'model')]) == 1
        err = capsys.readouterr().err
        assert message in err and len(err.splitlines()) == 1
        assert not list(out.iterdir())

    @pytest.mark.parametrize('arguments, suffix, packages', [
        (['onnx'], '.onnx', 'onnx onnxscript onnxruntime'),
        (['openvino'], '.xml', 'openvino onnx onnxscript'),
        (['openvino', '--quantize', 'int8', '--calibration', 'IMAGES'], '.xml', 'openvino onnx onnxscript nncf'),
        (['executorch'], '.pte', 'executorch'),
        (['transformers.js'], '', 'onnx onnxscript onnxruntime'),
    ])
    def test_without_the_extra(self, out, digits, capsys, monkeypatch, arguments, suffix, packages):
        monkeypatch.setattr(export, 'find_spec', lambda name: None)
        arguments = [str(digits) if a == 'IMAGES' else a for a in arguments]
        assert main(['export', 'no_model', '--out', str(out / f'model{suffix}'), '--format', *arguments]) == 1
        assert capsys.readouterr().err == (
            f't2t-timm export: The format {arguments[0]} needs more packages: pip install {packages}\n')
        assert not list(out.iterdir())

    def test_over_the_weights_of_something_else(self, out):
        (out / 'model.bin').write_text('before')
        with pytest.raises(UserError, match='exists and is not the weights of model.xml'):
            export_model(make_model(), out / 'model.xml', 'openvino')
        assert [p.read_text() for p in out.iterdir()] == ['before']

    def test_of_a_pair_that_differs(self, out, replace):
        def write(source, file):
            for name in (file, file.with_suffix('.bin')):
                name.write_text('new')
        replace('openvino', write=write, run=lambda file: lambda x: torch.ones(len(x), 10), packages=())
        for name in ('model.xml', 'model.bin'):
            (out / name).write_text('before')
        with pytest.raises(UserError, match='differs from the model'):
            export_model(make_model(), out / 'model.xml', 'openvino')
        assert [p.read_text() for p in out.iterdir()] == ['before', 'before']

    def test_over_a_folder_that_is_not_empty(self, out):
        (out / 'model').touch()
        with pytest.raises(UserError, match='exists and is not empty'):
            export_model(make_model(), out, 'transformers.js')
        assert [p.name for p in out.iterdir()] == ['model']

    def test_of_a_file_that_ends_its_runtime(self, out, monkeypatch, replace):
        replace('executorch', write=lambda source, file: file.touch(), packages=())
        done = subprocess.CompletedProcess([], -9, '', '')
        monkeypatch.setattr('subprocess.run', lambda *args, **kwargs: done)
        with pytest.raises(UserError, match=r'The runtime of ExecuTorch cannot run the file \(exit code -9\); nothing'):
            export_model(make_model(), out / 'model.pte', 'executorch')
        assert not list(out.iterdir())


class TestCalibration:
    def test_images_that_cannot_be_read_are_left_out(self, embedded, tmp_path, caplog):
        for name in ('a.png', 'c.png'):
            Image.new('L', (28, 28)).save(tmp_path / name)
        (tmp_path / 'b.png').write_bytes((tmp_path / 'a.png').read_bytes()[:40])
        (tmp_path / 'notes.txt').touch()
        files = find_images([str(tmp_path)])
        assert [file for file, _ in Calibration(files, embedded)] == [files[0], files[2]]
        skipped, left_out = caplog.messages
        assert skipped == f'Skipped 1 that has no extension of an image: {tmp_path / "notes.txt"}.'
        assert left_out.startswith(f'Left out: {tmp_path / "b.png"} cannot be read as an image: ')
        for name in ('a.png', 'c.png'):
            (tmp_path / name).write_text('text')
        with pytest.raises(UserError, match='None of the images in .* can be read'):
            Calibration(files, embedded)

    def test_each_image_is_decoded_once(self, tmp_path, monkeypatch):
        """Beyond the ones that are kept, too; and the agreement counts those that could be read."""
        decoded = []
        pixels = ImageReader.pixels
        monkeypatch.setattr(ImageReader, 'pixels', lambda self, file: decoded.append(file) or pixels(self, file))
        for i in range(SUBSET + 5):
            Image.new('L', (28, 28), i % 256).save(tmp_path / f'{i:03}.png')
        (tmp_path / '100.png').write_text('text')
        (tmp_path / '101.png').write_text('text')
        model = make_model(depth=1)
        calibration = Calibration(find_images([str(tmp_path)]), model)
        assert len(calibration.subset) < SUBSET
        with torch.no_grad():
            agreement = measure_agreement(model, model, calibration)
        assert agreement == (SUBSET + 3, SUBSET + 3, 0)
        assert sorted(decoded) == [str(tmp_path / f'{i:03}.png') for i in range(SUBSET + 5)]
