#!/usr/bin/env bash
# datasets 5.2.0 (Hugging Face), pillow 13.0.0.
# Seen: an image that was opened from a file and then changed in place (thumbnail(), paste(), drawing) is stored as it
#   was in the file: the encoder sees Image.filename and takes the file, not the pixels. An image made by copy(),
#   resize() or convert() has no filename and is stored as it is.
# A good guess: what is stored is the image in memory.
# Output, 2026-11-28: thumbnail of 32 x 32 stored as 128 x 128; pasted black square read back as 200; copy 32 x 32
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pillow==13.0.0
cd "$folder"
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
import numpy as np
from datasets import Dataset, Features, Image, disable_progress_bars
from PIL import Image as Pillow

disable_progress_bars()
Pillow.new('RGB', (128, 128), (200, 200, 200)).save('photo.png')
features = Features({'image': Image()})


def small():
    image = Pillow.open('photo.png')
    image.thumbnail((32, 32))
    return image


def generate():
    yield {'image': small()}


pasted = Pillow.open('photo.png')
pasted.paste((0, 0, 0), (0, 0, 64, 64))
stored = Dataset.from_dict({'image': [small(), pasted, small().copy()]}, features=features)['image'][:]
generated = Dataset.from_generator(generate, features=features)[0]['image']
corner = int(np.asarray(stored[1])[:64, :64].max())
print(f'thumbnail of {small().size} stored as {stored[0].size}, from a generator as {generated.size}; '
      f'pasted black square read back as {corner}; copy stored as {stored[2].size}')
if small().size != (32, 32) or stored[2].size != (32, 32):
    raise SystemExit('The images to store are not of the size that this script means to make.')
if stored[0].size != (128, 128) or generated.size != (128, 128) or corner != 200:
    raise SystemExit('An image changed in place is now stored as it is in memory.')
PY
