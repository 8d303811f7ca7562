#!/usr/bin/env bash
# onnxruntime 1.32.0, onnx 1.23.2, numpy 2.4.6; x86-64.
# Seen: Sigmoid in float32 is right to 1e-7 absolutely, not relatively. Small values have steps, up and down: that of
#   -17 is larger than that of -16, and from -18 down all are exactly 0. The scores of rare labels (tagging, detection,
#   SigLIP) lose their order, and their logarithm is minus infinity. PyTorch and NumPy give 9.4e-14 at -30.
# A good guess: as exact as float32 allows, some 1e-7 of the value, and never falling.
# Output, 2026-11-29: -5: 6.692916e-03 (true 6.692851e-03), -16: 5.960464e-08 (true 1.125352e-07), -17: 8.940697e-08
#   (true 4.139938e-08), -20: 0 (true 2.061154e-09)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import numpy as np
import onnxruntime
from onnx import TensorProto, checker, helper

vector = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ['n']) for name in 'xy']
graph = helper.make_graph([helper.make_node('Sigmoid', ['x'], ['y'])], 'sigmoid', vector[:1], vector[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid('', 20)], ir_version=10)
checker.check_model(model)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=['CPUExecutionProvider'])
x = np.array([-5, -16, -17, -20, -30], 'float32')
seen, = session.run(None, {'x': x})
steps, = session.run(None, {'x': np.linspace(-18, -12, 1000, dtype='float32')})
true = 1 / (1 + np.exp(-x.astype('float64')))
print(', '.join(f'{a:.0f}: {b:.6e} (true {c:.6e})' for a, b, c in zip(x, seen, true)))
if np.abs(seen - true).max() > 1e-6:
    raise SystemExit('Sigmoid is now wrong by more than 1e-6, absolutely.')
if np.abs(seen / true - 1)[1:3].max() < 0.1 or np.diff(steps).min() >= 0:
    raise SystemExit('Sigmoid of values from -18 to -12 no longer falls anywhere, or is exact to a tenth.')
if seen[3] != 0 or seen[4] != 0:
    raise SystemExit('Sigmoid no longer gives exactly 0 at -20 and -30.')
PY
