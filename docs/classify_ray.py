"""Classifies the images of folders on all machines of a Ray cluster, or on the cores of this one.

    pip install 'ray[data]'
    python classify_ray.py OUT IMAGES [IMAGES ...] [--model t2t_vit_14] [--actors 2] [--gpus 0] [--batch-size 32]
                           [--topk 5]

IMAGES are files, folders and globs that every machine sees under the same name; OUT is a new folder, which Parquet
files are written to. They have one row for each image: image, error (why it could not be read, else empty), index,
label and probability (lists, the most probable class first). Each actor has one model. Ray starts an actor that died
again, and gives its batches to others.
"""
import argparse
import os
from typing import Any

os.environ.setdefault('RAY_USAGE_STATS_ENABLED', '0')  # otherwise a cluster tells its makers that it was started

import numpy as np
import ray
import timm
import torch

from t2t_timm.commands.classify import class_names
from t2t_timm.commands.images import ImageReader, find_images


class Classifier:
    """A model and its preprocessing in an actor."""

    def __init__(self, model: str, topk: int, device: str) -> None:
        self.model = timm.create_model(model, pretrained=True).to(device).eval()
        self.read, self.names = ImageReader(self.model), class_names(self.model)
        self.topk, self.device = min(topk, len(self.names)), device

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """Classify the files that a batch names."""
        rows = [dict(image=file, error='', index=[], label=[], probability=[]) for file in batch['item'].tolist()]
        pixels = []
        for row in rows:
            try:
                pixels.append(self.read.pixels(row['image']))
            except ValueError as e:
                row['error'] = str(e)
        if pixels:
            with torch.inference_mode():
                logits = self.model(self.read.normalize(torch.stack(pixels).to(self.device)))
            values, indices = logits.softmax(dim=1).cpu().topk(self.topk)
            good = [row for row in rows if not row['error']]
            for row, value, index in zip(good, values.tolist(), indices.tolist(), strict=True):
                row.update(index=index, label=[self.names[i] for i in index], probability=value)
        return {key: [row[key] for row in rows] for key in rows[0]}


def main() -> None:
    """Read the arguments, and classify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', metavar='OUT')
    parser.add_argument('images', metavar='IMAGES', nargs='+')
    parser.add_argument('--model', default='t2t_vit_14')
    parser.add_argument('--actors', type=int, default=2, help='models at work at a time')
    parser.add_argument('--gpus', type=float, default=0, help='of each actor; 0 computes on CPUs')
    parser.add_argument('--batch-size', type=int, default=32)
    parser.add_argument('--topk', type=int, default=5)
    args = parser.parse_args()
    files = find_images([os.path.abspath(name) for name in args.images])
    if os.path.exists(args.out):
        parser.error(f'{args.out} exists: name a new folder')
    ray.init()  # RAY_ADDRESS names a cluster
    dataset = ray.data.from_items(files, override_num_blocks=-(-len(files) // (8 * args.batch_size)))  # one file each
    dataset = dataset.map_batches(
        Classifier,
        fn_constructor_args=(args.model, args.topk, 'cuda' if args.gpus else 'cpu'),
        batch_size=args.batch_size,
        compute=ray.data.ActorPoolStrategy(size=args.actors),
        num_cpus=0.5,  # leaves room for the tasks that write
        num_gpus=args.gpus,
    )
    dataset.write_parquet(args.out, ray_remote_args=dict(num_cpus=0.25))


if __name__ == '__main__':
    main()
