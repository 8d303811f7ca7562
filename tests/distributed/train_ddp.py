"""Train test_t2t_vit on digits in one process, or under torchrun in several, on the CPU; of timm's own parts.

    python train_ddp.py --data-dir digits --output one --batch-size 64
    torchrun --nproc-per-node 2 train_ddp.py --data-dir digits --output two --batch-size 32

What timm's train.py does, but for the device_ids that it hands to DistributedDataParallel, which torch refuses on the
CPU. Rank 0 appends a line of JSON to OUTPUT/log.jsonl for each epoch, and keeps OUTPUT/last.pth.tar to --resume from.
"""
import argparse
import json
import os
import signal
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import (
    CheckpointSaver,
    ModelEmaV3,
    accuracy,
    init_distributed_device,
    is_primary,
    random_seed,
    reduce_tensor,
    unwrap_model,
)
from torch.nn.parallel import DistributedDataParallel


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-dir', required=True, help='ImageFolders train/ and validation/')
    parser.add_argument('--output', type=Path, required=True)
    parser.add_argument('--batch-size', type=int, default=32, help='of each process')
    parser.add_argument('--epochs', type=int, default=10)
    parser.add_argument('--seed', type=int, default=42)
    parser.add_argument('--exact', action='store_true', help='no dropout, no augmentation: no random number')
    parser.add_argument('--resume', help='checkpoint to go on from')
    parser.add_argument('--kill-in-epoch', type=int, help='the last rank kills itself in the middle of this epoch')
    args = parser.parse_args()
    args.device = 'cpu'
    args.model = 'test_t2t_vit'  # CheckpointSaver notes it
    return args


def make_loader(args: argparse.Namespace, split: str):
    """Return timm's loader of a split; in several processes each reads its own part."""
    is_training = split == 'train'
    return create_loader(
        create_dataset('', root=args.data_dir, split=split, is_training=is_training), input_size=(3, 28, 28),
        batch_size=args.batch_size, is_training=is_training, no_aug=args.exact, scale=(0.7, 1.), hflip=0.,
        color_jitter=0., interpolation='bicubic', crop_pct=1., num_workers=0, distributed=args.distributed,
        use_prefetcher=False)


def train_epoch(args, epoch, model, ema, optimizer, scheduler, loader) -> float:
    """Train for an epoch and return the mean loss of all ranks."""
    model.train()
    total = torch.zeros(())
    for step, (images, labels) in enumerate(loader):
        if epoch == args.kill_in_epoch and step == len(loader) // 2 and args.rank == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        loss = torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        optimizer.step()
        optimizer.zero_grad()
        num_updates = epoch * len(loader) + step + 1
        ema.update(unwrap_model(model), step=num_updates)
        scheduler.step_update(num_updates)
        total += loss.detach()
    return mean_of_ranks(args, total / len(loader))


def mean_of_ranks(args: argparse.Namespace, value: torch.Tensor) -> float:
    return (reduce_tensor(value, args.world_size) if args.distributed else value).item()


@torch.inference_mode()
def validate(args, model, loader) -> float:
    """Return the top-1 accuracy in percent over what all ranks read."""
    model.eval()
    results = [(model(images), labels) for images, labels in loader]
    top1, = accuracy(*(torch.cat(values) for values in zip(*results, strict=True)))
    return mean_of_ranks(args, top1)


def main() -> None:
    args = parse_args()
    torch.set_num_threads(1)
    init_distributed_device(args)
    random_seed(args.seed, args.rank)  # as train.py does: every rank starts from other weights, and DDP takes rank 0's

    model = timm.create_model(
        args.model, num_classes=10, img_size=28, token_drop_rate=0. if args.exact else 0.1)
    loader, loader_eval = make_loader(args, 'train'), make_loader(args, 'validation')
    optimizer = create_optimizer_v2(model, opt='adamw', lr=2e-3, weight_decay=0.05)
    start_epoch = resume_checkpoint(model, args.resume, optimizer, log_info=False) if args.resume else 0
    ema = ModelEmaV3(model, decay=0.95)
    if args.resume:
        load_checkpoint(ema.module, args.resume, use_ema=True)
    if args.distributed:
        model = DistributedDataParallel(model)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched='cosine', num_epochs=args.epochs, warmup_epochs=1, warmup_lr=1e-5, min_lr=1e-5,
        step_on_epochs=False, updates_per_epoch=len(loader))
    scheduler.step_update(start_epoch * len(loader))
    saver = None
    if is_primary(args):
        args.output.mkdir(exist_ok=True)
        saver = CheckpointSaver(
            model, optimizer, model_ema=ema, checkpoint_dir=str(args.output), recovery_dir=str(args.output),
            max_history=1)

    for epoch in range(start_epoch, args.epochs):
        if args.distributed:
            loader.sampler.set_epoch(epoch)
        loss = train_epoch(args, epoch, model, ema, optimizer, scheduler, loader)
        row = dict(epoch=epoch, loss=loss, top1=validate(args, model, loader_eval),
                   top1_ema=validate(args, ema.module, loader_eval), lr=optimizer.param_groups[0]['lr'])
        if saver is not None:
            saver.save_checkpoint(epoch, metric=row['top1_ema'])
            with open(args.output / 'log.jsonl', 'a') as f:
                f.write(json.dumps(row) + '\n')
    if args.distributed:
        torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main()
