"""What an exported graph is: its weights, and its range in half precision."""
import warnings

import numpy as np
import pytest
import timm
import torch
from flat import flat_images
from published import golden_model

from t2t_timm.commands.constants import fold_constants, split_linear_maps
from t2t_timm.commands.export import export_model
from t2t_timm.commands.images import ImageReader


@pytest.fixture
def run_in_float16(tmp_path):
    """A function that converts an ONNX file to float16 as people do, and gives a function of images."""
    onnx = pytest.importorskip('onnx', reason='pip install t2t-timm[onnx]')
    onnxruntime = pytest.importorskip('onnxruntime', reason='pip install t2t-timm[onnx]')
    float16 = pytest.importorskip('onnxconverter_common.float16', reason='pip install onnxconverter-common')

    def run_in_float16(file):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # it tells of each weight below float16's smallest number
            onnx.save(float16.convert_float_to_float16(onnx.load(file)), tmp_path / 'half.onnx')
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # it tells of what it has no kernel for
        session = onnxruntime.InferenceSession(tmp_path / 'half.onnx', options, providers=['CPUExecutionProvider'])
        return lambda x: torch.from_numpy(session.run(None, {'x': x.numpy().astype(np.float16)})[0]).float()
    return run_in_float16


@pytest.mark.slow
def test_float16_reads_the_digits(run_in_float16, onnx_file, embedded, heldout):
    run, read = run_in_float16(onnx_file), ImageReader(embedded)
    files = sorted(heldout.glob('*/*'))
    logits = torch.cat([run(torch.cat([read(str(f)) for f in files[i:i + 50]])) for i in range(0, len(files), 50)])
    targets = torch.tensor([int(f.parent.name[0]) for f in files])
    assert logits.isfinite().all()
    assert (logits.argmax(dim=1) == targets).float().mean().item() == pytest.approx(0.982, abs=0.003)


@pytest.mark.slow
@pytest.mark.parametrize('gain', [1., 10.])
def test_float16_keeps_its_range(run_in_float16, tmp_path, gain):
    """Large keys and queries, values of 30, and flat images, whose tokens are all alike."""
    model = golden_model('t2t_vit_7', 'large_norm', img_size=112, depth=1, num_classes=10)
    with torch.no_grad():
        for step in (model.patch_embed.attention1, model.patch_embed.attention2):
            step.kqv.weight[:128] *= gain
            step.kqv.bias[128:] += 30.
    x = torch.cat([*flat_images(112).values()]).float()
    with torch.no_grad():
        expected = model(x)
    logits = run_in_float16(export_model(model, tmp_path / 'model.onnx').path)(x)
    assert logits.isfinite().all()
    if gain == 1.:
        assert (logits - expected).abs().max() < 0.01 * expected.abs().max()


@pytest.mark.parametrize('token_type', ['performer', 'transformer'])
def test_no_weight_is_computed_in_the_graph(token_type):
    torch.manual_seed(0)
    model = timm.create_model('test_t2t_vit', depth=2, token_type=token_type).eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    x = torch.randn(2, 3, 56, 56)
    program = torch.export.export(model, (x,), strict=False)
    fold_constants(program)
    images, = program.graph_signature.user_inputs
    weights = [node for node in program.graph.find_nodes(op='placeholder') if node.name != images]
    for node in program.graph.nodes:
        assert node.op != 'call_function' or not {*weights} >= {*node.all_input_nodes}, node
    names = [spec.target for spec in program.graph_signature.input_specs if spec.target]
    assert {*names} == {*program.state_dict}
    for name, weight in program.state_dict.items():  # ExecuTorch reads a slice of a constant at the wrong place
        assert weight.is_contiguous() and weight.storage_offset() == 0, name
        assert weight.untyped_storage().nbytes() == weight.nbytes, name
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize('token_type', ['performer', 'transformer', 'convolution'])
def test_linear_maps_are_not_cut_and_biases_are_in_products_of_matrices(token_type):
    torch.manual_seed(0)
    model = timm.create_model('test_t2t_vit', depth=2, token_type=token_type, qkv_bias=True).eval()
    x, aten = torch.randn(2, 3, 56, 56), torch.ops.aten
    program = split_linear_maps(torch.export.export(model, (x,), strict=False))
    for unbind in program.graph.find_nodes(op='call_function', target=aten.unbind.int):
        source = unbind.args[0]
        while source.target in (aten.view.default, aten.reshape.default, aten.permute.default):
            source = source.args[0]
        assert source.target != aten.linear.default, unbind
    linear = program.graph.find_nodes(op='call_function', target=aten.linear.default)
    assert linear and all(len(node.args) < 3 or node.args[0].meta['val'].ndim == 2 for node in linear)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=1e-5)
