#!/usr/bin/env bash
# pyvips 3.2.0, pyvips-binary 8.18.7 (libvips), pillow 13.0.0, numpy 2.4.6.
# Seen: image.resize(scale) with scale > 1 puts everything half a pixel of the enlarged image off where Pillow, OpenCV
#   and PyTorch (align_corners=False) have it: an edge between two pixels, enlarged twice, is 100, 200 and not 50, 150.
#   And kernel='lanczos3' enlarges with the cubic kernel, to the bit. Overlays, boxes and masks made with another
#   library do not fit.
# A good guess: pixel centres correspond as everywhere, and the kernel asked for is used.
# Output, 2026-11-28: edge of 0 and 200, linear, twice: pyvips [0, 0, 100, 200], Pillow [0, 50, 150, 200]; noise, 1.5
#   times: off by 101 of 255 (linear), 142 (cubic), 149 (lanczos3)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    pyvips==3.2.0 pyvips-binary==8.18.7 pillow==13.0.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import numpy as np
import pyvips
from PIL import Image

methods = {'linear': Image.Resampling.BILINEAR, 'cubic': Image.Resampling.BICUBIC, 'lanczos3': Image.Resampling.LANCZOS}


def both(pixels, scale, kernel):
    size = [round(n * scale) for n in pixels.shape[1::-1]]
    vips = pyvips.Image.new_from_array(pixels).resize(scale, kernel=kernel).numpy()
    return vips.astype(int), np.asarray(Image.fromarray(pixels).resize(size, methods[kernel])).astype(int)


edge = np.zeros((4, 16), 'uint8')
edge[:, 8:] = 200
vips, pillow = (x[4, 14:18].tolist() for x in both(edge, 2, 'linear'))
noise = np.random.RandomState(0).randint(0, 256, (64, 64)).astype('uint8')
enlarged = {kernel: both(noise, 1.5, kernel) for kernel in methods}
off = {kernel: int(np.abs(a - b).max()) for kernel, (a, b) in enlarged.items()}
print(f'edge: pyvips {vips}, Pillow {pillow}; noise, 1.5 times: off by {off}')
if pillow != [0, 50, 150, 200]:
    raise SystemExit('Pillow no longer enlarges the edge to 0, 50, 150, 200.')
if vips != [0, 0, 100, 200] or min(off.values()) < 40:
    raise SystemExit('pyvips no longer shifts what it enlarges.')
if not np.array_equal(enlarged['cubic'][0], enlarged['lanczos3'][0]):
    raise SystemExit("kernel='lanczos3' no longer enlarges as 'cubic' does.")
PY
