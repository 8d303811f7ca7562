#!/usr/bin/env bash
# kornia 0.9.0, torch 2.13.0.
# Seen: kornia.augmentation.Resize, at its defaults, aligns the corners of the images (align_corners=True) and does not
#   antialias: it equals F.interpolate(align_corners=True), and is far from Pillow's, torchvision's and timm's resize.
#   kornia.geometry.transform.resize of the same release has align_corners=None, which is False.
# A good guess: pixel centres as in PyTorch's own default and torchvision, and the same in both of kornia's.
# Output, 2026-11-29: 64 to 24 pixels of noise in 0 to 1, largest difference: from align_corners=True 0.000, from
#   align_corners=False 0.708, from kornia.geometry's resize 0.708, from an antialiased one 0.545
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check kornia==0.9.0 torch==2.13.0
cd "$folder"
venv/bin/python - <<'PY'
import torch
from kornia.augmentation import Resize
from kornia.geometry.transform import resize
from torch.nn.functional import interpolate

x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
seen = Resize((24, 24))(x)
others = {
    'align_corners=True': interpolate(x, (24, 24), mode='bilinear', align_corners=True),
    'align_corners=False': interpolate(x, (24, 24), mode='bilinear', align_corners=False),
    "kornia.geometry's resize": resize(x, (24, 24)),
    'an antialiased one': interpolate(x, (24, 24), mode='bilinear', antialias=True),
}
off = {name: (seen - other).abs().max().item() for name, other in others.items()}
print('largest difference: ' + ', '.join(f'from {name} {value:.3f}' for name, value in off.items()))
if off.pop('align_corners=True') > 1e-4:
    raise SystemExit('kornia.augmentation.Resize no longer aligns corners.')
if min(off.values()) < 0.1:
    raise SystemExit('kornia.augmentation.Resize now equals a resize that does not align corners.')
PY
