#!/usr/bin/env bash
# imageio 2.38.1, tifffile 2026.3.3, pillow 13.0.0.
# Seen: how many axes imageio.v3.imread() returns depends on the format. Three frames of a TIFF, GIF or PNG give (3, H,
#   W, 3), the same three of a WebP or AVIF the first frame alone, (H, W, 3); a GIF of one frame gives (1, H, W, 3).
#   index=0 is the first frame of a GIF, and all frames of a TIFF.
# A good guess: all frames, or the first, of every format, and index=0 is always one image.
# Output, 2026-11-28: tiff (3, 6, 8, 3), gif (3, 6, 8, 3), png (3, 6, 8, 3), webp (6, 8, 3), avif (6, 8, 3); index=0:
#   tiff (3, 6, 8, 3), gif (6, 8, 3); a GIF of one frame: (1, 6, 8, 3)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    imageio==2.38.1 tifffile==2026.3.3 pillow==13.0.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'PY'
import imageio.v3 as iio
from PIL import Image

first, *rest = [Image.new('RGB', (8, 6), (80 * k, 0, 0)) for k in (1, 2, 3)]
formats = 'tiff', 'gif', 'png', 'webp', 'avif'
for extension in formats:
    first.save(f'three.{extension}', save_all=True, append_images=rest)
    with Image.open(f'three.{extension}') as image:
        if image.n_frames != 3:
            raise SystemExit(f'Pillow no longer writes three frames as {extension}.')
first.save('one.gif')
shapes = {e: iio.imread(f'three.{e}').shape for e in formats}
at_zero = {e: iio.imread(f'three.{e}', index=0).shape for e in ('tiff', 'gif')}
one = iio.imread('one.gif').shape
print(', '.join(f'{e} {s}' for e, s in shapes.items()) +
      '; index=0: ' + ', '.join(f'{e} {s}' for e, s in at_zero.items()) + f'; a GIF of one frame: {one}')
if any(shapes[e] != (3, 6, 8, 3) for e in ('tiff', 'gif', 'png')) or one != (1, 6, 8, 3):
    raise SystemExit('imread() no longer returns all frames of TIFF, GIF and PNG.')
if any(shapes[e] != (6, 8, 3) for e in ('webp', 'avif')):
    raise SystemExit('imread() no longer returns the first frame alone of WebP and AVIF.')
if at_zero != {'tiff': (3, 6, 8, 3), 'gif': (6, 8, 3)}:
    raise SystemExit('index=0 no longer means all frames of a TIFF and the first of a GIF.')
PY
