#!/usr/bin/env bash
# torchmetrics 1.9.0, torch 2.13.0.
# Seen: the binary metrics take logits or probabilities and decide which, for each update() alone, by whether a value
#   lies outside 0 to 1. A batch of logits that all lie inside (a last batch of one image is enough) is not put through
#   the sigmoid, so that the same logits have another AUROC in another batch size, and a logit of 0.4 counts as a no.
# A good guess: the metric of a set does not depend on its batches; logits are always, or never, put through a sigmoid.
# Output, 2026-11-29: AUROC of six logits in one batch 1.000, in batches of two 0.778; accuracy of the logits 0.1 and
#   0.4, both of class 1: alone 0.000, beside a third of 1.4 1.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check torchmetrics==1.9.0 torch==2.13.0
cd "$folder"
venv/bin/python - <<'PY'
import torch
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC

logits = torch.tensor([-2.0, 3.0, 0.2, 0.9, 1.2, 2.0])
labels = torch.tensor([0, 1, 0, 0, 1, 1])


def auroc(size):
    metric = BinaryAUROC()
    for x, y in zip(logits.split(size), labels.split(size)):
        metric.update(x, y)
    return metric.compute().item()


one, several = auroc(6), auroc(2)
two = torch.tensor([0.1, 0.4])
alone = BinaryAccuracy()(two, torch.ones(2)).item()
beside = BinaryAccuracy()(torch.cat([two, torch.tensor([1.4])]), torch.ones(3)).item()
print(f'AUROC in one batch {one:.3f}, in batches of two {several:.3f}; accuracy alone {alone:.3f}, beside {beside:.3f}')
if one != 1:
    raise SystemExit('The AUROC of logits in perfect order is no longer 1 in one batch.')
if several == one or alone != 0 or beside != 1:
    raise SystemExit('The binary metrics no longer decide for each batch whether they are given logits.')
PY
