#!/usr/bin/env bash
# pillow 13.0.0, numpy 2.4.6.
# Seen: Image.fromarray() of a contiguous array shares its memory in the modes L, RGBA and I;16, and copies in RGB and
#   F. A buffer that is filled again for each frame (video, microscope, augmentation in place) gives a list of images
#   that all show the last frame if they are grey, and the right ones if they are RGB.
# A good guess: it copies, whatever the mode.
# Output, 2026-11-28: frames 1, 2, 3 read back as L [3, 3, 3], RGBA [3, 3, 3], I;16 [3, 3, 3], RGB [1, 2, 3], F [1, 2,
#   3]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check pillow==13.0.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import numpy as np
from PIL import Image

buffers = {
    'L': np.zeros((4, 4), 'uint8'),
    'RGBA': np.zeros((4, 4, 4), 'uint8'),
    'I;16': np.zeros((4, 4), 'uint16'),
    'RGB': np.zeros((4, 4, 3), 'uint8'),
    'F': np.zeros((4, 4), 'float32'),
}
read = {}
for mode, buffer in buffers.items():
    images = []
    for value in (1, 2, 3):
        buffer[:] = value
        images.append(Image.fromarray(buffer))
    if {image.mode for image in images} != {mode}:
        raise SystemExit(f'fromarray() no longer makes an image of mode {mode} here.')
    read[mode] = [int(np.asarray(image).flat[0]) for image in images]
print('frames 1, 2, 3 read back as ' + ', '.join(f'{mode} {values}' for mode, values in read.items()))
if any(read[mode] != [3, 3, 3] for mode in ('L', 'RGBA', 'I;16')):
    raise SystemExit('fromarray() no longer shares memory in the modes L, RGBA and I;16.')
if any(read[mode] != [1, 2, 3] for mode in ('RGB', 'F')):
    raise SystemExit('fromarray() no longer copies in the modes RGB and F.')
PY
