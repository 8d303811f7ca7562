#!/usr/bin/env bash
# datasets 5.2.0 (Hugging Face), pillow 13.0.0.
# Seen: load_dataset('imagefolder') of the class folders bus, car and train reads the folder train as the training
#   split, drops the two other classes without a word, and gives no labels. The class names of COCO, VOC and CIFAR-100
#   include train. Folders bus, car and lorry are read as three classes.
# A good guess: one folder is one class, whatever its name.
# Output, 2026-11-28: bus, car, train: 3 of 9 images, columns ['image']; bus, car, lorry: 9 images, 3 classes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check datasets==5.2.0 pillow==13.0.0
cd "$folder"
HF_HOME="$folder/home" HF_HUB_OFFLINE=1 venv/bin/python - <<'PY'
from pathlib import Path

from datasets import disable_progress_bars, load_dataset
from PIL import Image

disable_progress_bars()


def load(names):
    for k, name in enumerate(names):
        folder = Path(names[-1] + '_photos', name)
        folder.mkdir(parents=True)
        for i in range(3):
            Image.new('RGB', (8, 8), (80 * k, 80 * i, 0)).save(folder / f'{i}.png')
    return load_dataset('imagefolder', data_dir=names[-1] + '_photos')


train, lorry = load(['bus', 'car', 'train']), load(['bus', 'car', 'lorry'])
names = lorry['train'].features['label'].names
print(f'bus, car, train: {sum(train.num_rows.values())} of 9 images, columns {train["train"].column_names}; '
      f'bus, car, lorry: {lorry["train"].num_rows} images, {len(names)} classes')
if lorry['train'].num_rows != 9 or names != ['bus', 'car', 'lorry']:
    raise SystemExit('Three class folders are no longer read as three classes.')
if list(train) != ['train'] or train['train'].num_rows != 3 or 'label' in train['train'].features:
    raise SystemExit('A class folder called train is now read as a class.')
PY
