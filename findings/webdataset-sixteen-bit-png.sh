#!/usr/bin/env bash
# webdataset 1.0.2, pillow 13.0.0, numpy 2.4.6.
# Seen: decode('rgb'), decode('l') and their like turn a grey PNG of 16 bits (X-rays, depth, microscopes) into white:
#   all values from 255 of 65,535 up become 1.0, since the reader asks Pillow for 8 bits and Pillow clips. No warning.
# A good guess: floats of 0 to 1 are the values divided by 65,535.
# Output, 2026-11-28: 0, 255, 1000, 40000, 65535 are read as 0.0, 1.0, 1.0, 1.0, 1.0 (rgb) and the same (l)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check webdataset==1.0.2 pillow==13.0.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import io

import numpy as np
import webdataset
from PIL import Image

values = np.array([[0, 255, 1000, 40000, 65535]], 'uint16')
file = io.BytesIO()
Image.fromarray(values).save(file, 'png')
if not np.array_equal(np.asarray(Image.open(file)), values):
    raise SystemExit('Pillow no longer keeps the 16 bits of a grey PNG.')
with webdataset.TarWriter('images.tar') as tar:
    tar.write({'__key__': '0', 'png': file.getvalue()})
read = {}
for kind in ('rgb', 'l'):
    sample = next(iter(webdataset.WebDataset('images.tar', shardshuffle=False).decode(kind)))
    read[kind] = sample['png'].reshape(1, 5, -1)[0, :, 0].tolist()
print(f'{values[0].tolist()} are read as {read["rgb"]} (rgb) and {read["l"]} (l)')
if any(pixels != [0, 1, 1, 1, 1] for pixels in read.values()):
    raise SystemExit('A grey PNG of 16 bits is no longer clipped to white.')
PY
