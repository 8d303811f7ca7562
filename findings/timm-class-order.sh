#!/usr/bin/env bash
# timm 1.0.31, torchvision 0.29.1, torch 2.14.1, pillow 13.0.0. Installs 5.5 GB.
# Seen: timm and torchvision number the classes of one image folder differently. timm sorts names as people do, with
#   numbers as numbers and without regard to case; torchvision sorts by code points. timm also reads .png, .jpg and
#   .jpeg alone, and skips .webp, .bmp and .tif without a word where a class has both. A model trained with one reader
#   and measured with the other looks wrong.
# A good guess: both sort the folders' names, and read the same images.
# Output, 2026-11-29: timm ['1', '2', '10', 'apple', 'Zebra'], 5 images; torchvision ['1', '10', '2', 'Zebra', 'apple'],
#   20
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check \
    timm==1.0.31 torchvision==0.29.1 torch==2.14.1 pillow==13.0.0
cd "$folder"
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
from pathlib import Path

import timm.data
import torchvision
from PIL import Image

for name in ('1', '2', '10', 'apple', 'Zebra'):
    Path('photos', name).mkdir(parents=True)
    for extension in ('png', 'webp', 'bmp', 'tif'):
        Image.new('RGB', (8, 8)).save(f'photos/{name}/photo.{extension}')
ours, theirs = timm.data.create_dataset('', 'photos'), torchvision.datasets.ImageFolder('photos')
order = [sorted(d, key=d.get) for d in (ours.reader.class_to_idx, theirs.class_to_idx)]
print(f'timm {order[0]}, {len(ours)} images; torchvision {order[1]}, {len(theirs)}')
if order[0] != ['1', '2', '10', 'apple', 'Zebra'] or order[1] != ['1', '10', '2', 'Zebra', 'apple']:
    raise SystemExit('timm or torchvision now numbers the classes in another order.')
if (len(ours), len(theirs)) != (5, 20):
    raise SystemExit('timm or torchvision now reads other kinds of files.')
PY
