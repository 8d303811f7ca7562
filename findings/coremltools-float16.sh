#!/usr/bin/env bash
# coremltools 9.0, torch 2.13.0, numpy 2.3.5.
# Seen: two things about the float16 that convert() computes in by default. Asked for iOS 15, a model reads and returns
#   float32; asked for iOS 16 or later, float16, though nobody named a type of the inputs. And a LayerNorm's epsilon of
#   1e-12 (that of the ViTs of Transformers), which float16 would round to 0, becomes 6e-8.
# A good guess: the inputs and outputs stay float32, as those of the PyTorch model; 1e-12 becomes 0, or stays.
# Output, 2026-11-28: iOS 15: FLOAT32, FLOAT32; iOS 16: FLOAT16, FLOAT16; epsilon 1e-12 becomes 6e-08, 1e-06 stays 1e-06
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check coremltools==9.0 torch==2.13.0 numpy==2.3.5
cd "$folder"
venv/bin/python - 2>errors.txt <<'PY' || { tail -n 5 errors.txt; exit 1; }
import coremltools
import torch


def convert(target, epsilon):
    example = torch.rand(1, 64)
    layer = torch.jit.trace(torch.nn.LayerNorm(64, eps=epsilon).eval(), example)
    model = coremltools.convert(
        layer, inputs=[coremltools.TensorType(shape=example.shape)], minimum_deployment_target=target)
    description = model.get_spec().description
    types = [x.type.multiArrayType for x in (*description.input, *description.output)]
    names = [t.ArrayDataType.Name(t.dataType) for t in types]
    norm, = (op for op in model._mil_program.functions['main'].operations if op.op_type == 'layer_norm')
    return names, float(norm.inputs['epsilon'].val)


old, small = convert(coremltools.target.iOS15, 1e-12)
new, usual = convert(coremltools.target.iOS16, 1e-6)
print(f'iOS 15: {", ".join(old)}; iOS 16: {", ".join(new)}; '
      f'epsilon 1e-12 becomes {small:.0e}, 1e-06 becomes {usual:.0e}')
if old != ['FLOAT32', 'FLOAT32'] or new != ['FLOAT16', 'FLOAT16']:
    raise SystemExit('The types of inputs and outputs are no longer float32 for iOS 15 and float16 for iOS 16.')
if not 3e-8 < small < 1e-7 or not 9e-7 < usual < 1.1e-6:
    raise SystemExit('An epsilon of 1e-12 no longer becomes 6e-8, or one of 1e-6 no longer stays.')
PY
