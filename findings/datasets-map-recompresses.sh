#!/usr/bin/env bash
# datasets 5.2.0 (Hugging Face), pillow 13.0.0.
# Seen: map() with a function that only reads a JPEG image (here its width), and returns another column, writes the
#   image column anew: decoded, and compressed again at Pillow's quality 75. A function that does not touch the image
#   leaves its bytes alone.
# A good guess: a column that the function does not return keeps its bytes.
# Output, 2026-11-28: 16,614 bytes become 5,527, largest difference 23 of 255; not read: 16,614 bytes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pillow==13.0.0
cd "$folder"
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
import io

import numpy as np
from datasets import Dataset, Features, Image, disable_progress_bars
from PIL import Image as Pillow

disable_progress_bars()
y, x = np.mgrid[:192, :192]
noise = np.random.RandomState(0).randn(192, 192, 3) * 6
photo = np.stack([x, y, 255 - x], axis=-1) + 30 * np.sin(x / 3)[..., None] + noise
file = io.BytesIO()
Pillow.fromarray(photo.clip(0, 255).astype('uint8')).save(file, 'jpeg', quality=95)
first = file.getvalue()
data = Dataset.from_dict({'image': [{'bytes': first, 'path': None}]}, features=Features({'image': Image()}))


def encoded(data):
    return data.cast_column('image', Image(decode=False))[0]['image']['bytes']


def difference(data):
    pixels = [np.asarray(Pillow.open(io.BytesIO(b))).astype(int) for b in (first, encoded(data))]
    return int(np.abs(pixels[0] - pixels[1]).max())


once = data.map(lambda row: {'width': row['image'].width})
unread = data.map(lambda row: {'one': 1})
print(f'{len(first):,} bytes become {len(encoded(once)):,}, largest difference {difference(once)} of 255; '
      f'not read: {len(encoded(unread)):,} bytes')
if encoded(unread) != first:
    raise SystemExit('map() now writes images that its function does not read.')
if encoded(once) == first or len(encoded(once)) > 0.7 * len(first) or difference(once) < 8:
    raise SystemExit('map() no longer compresses again an image that its function only reads.')
PY
