#!/usr/bin/env bash
# onnxruntime 1.32.0, openvino 2026.4.1, onnx 1.23.2, numpy 2.4.6; x86-64.
# Seen: one valid model, Cast from float32 to uint8, which makes an image of a network's output (or of a cubic resize,
#   which overshoots). onnxruntime wraps: 300 becomes 44, -5 becomes 251. OpenVINO saturates: 255 and 0. ONNX leaves
#   values outside the range open; a Clip before the Cast makes both agree.
# A good guess: both do the same, whichever it is.
# Output, 2026-11-28: of 300, -5, 130: onnxruntime [44, 251, 130], OpenVINO [255, 0, 130]; with Clip both [255, 0, 130]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    onnxruntime==1.32.0 openvino==2026.4.1 onnx==1.23.2 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import numpy as np
import onnxruntime
import openvino
from onnx import TensorProto, checker, helper, numpy_helper, save


def run(clip):
    nodes = [helper.make_node('Cast', ['v' if clip else 'x'], ['y'], to=TensorProto.UINT8)]
    limits = [numpy_helper.from_array(np.float32(v), name) for name, v in (('low', 0), ('high', 255))] if clip else []
    if clip:
        nodes.insert(0, helper.make_node('Clip', ['x', 'low', 'high'], ['v']))
    ends = [helper.make_tensor_value_info('x', TensorProto.FLOAT, ['n'])], [
        helper.make_tensor_value_info('y', TensorProto.UINT8, ['n'])]
    model = helper.make_model(
        helper.make_graph(nodes, 'cast', *ends, limits), opset_imports=[helper.make_opsetid('', 18)], ir_version=9)
    checker.check_model(model)
    save(model, 'cast.onnx')
    x = np.array([300, -5, 130], 'float32')
    session = onnxruntime.InferenceSession('cast.onnx', providers=['CPUExecutionProvider'])
    return session.run(None, {'x': x})[0].tolist(), openvino.compile_model('cast.onnx', 'CPU')(x)[0].tolist()


bare, clipped = run(clip=False), run(clip=True)
print(f'of 300, -5, 130: onnxruntime {bare[0]}, OpenVINO {bare[1]}; with Clip {clipped[0]}, {clipped[1]}')
if clipped != ([255, 0, 130], [255, 0, 130]):
    raise SystemExit('With Clip, the two no longer agree.')
if bare[0] != [44, 251, 130]:
    raise SystemExit('onnxruntime no longer wraps float32 to uint8.')
if bare[1] != [255, 0, 130]:
    raise SystemExit('OpenVINO no longer saturates float32 to uint8.')
PY
