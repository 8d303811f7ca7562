"""What the ranks of a torchrun do in the tests, on the CPU, of timm's own parts; gradients and weights go to files.

    torchrun --nproc-per-node 2 ranks.py IMAGES DIR performer-ddp performer-fsdp

Each rank writes DIR/CASE.RANK.pt for each case MODEL-WAY. The tests import what makes the model and the batch, and take
the same step in one process.
"""
import argparse
import os
import signal
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn as nn
from timm.data import create_dataset, create_loader
from timm.models import load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver, ModelEmaV3, init_distributed_device, unwrap_model
from torch.nn.parallel import DistributedDataParallel

from t2t_timm.ops import can_fuse

MODELS = {'performer': dict(depth=2), 'transformer': dict(depth=2, token_type='transformer')}
DDP_WAYS = ('ddp', 'static_graph', 'checkpointing', 'accumulation')
FSDP_WAYS = ('fsdp', 'fsdp_checkpointing')


def create_model(name: str, seed: int) -> nn.Module:
    """Return a small model in float64, without dropout, which each rank would draw for itself."""
    torch.manual_seed(seed)
    return timm.create_model('test_t2t_vit', num_classes=10, token_drop_rate=0., **MODELS[name]).double().train()


def load_batch(data_dir: str, distributed: bool = False):
    """Return images (B, 3, 56, 56), float64, and labels: the ten of this rank, or all twenty."""
    loader = create_loader(
        create_dataset('', root=data_dir), input_size=(3, 56, 56), batch_size=10 if distributed else 20,
        num_workers=0, distributed=distributed, use_prefetcher=False)
    images, labels = next(iter(loader))
    return images.double(), labels


def loss_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)


def create_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.05)


def full(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return copies of the tensors, those of FSDP put together from all ranks."""
    return {k: (t.full_tensor() if hasattr(t, 'full_tensor') else t).detach().clone() for k, t in tensors.items()}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return full({k: p.grad for k, p in model.named_parameters()})


def ddp_step(model: nn.Module, way: str, images: torch.Tensor, labels: torch.Tensor) -> dict[str, object]:
    """Take a step under DistributedDataParallel."""
    if torch.distributed.get_rank() == 1:
        model.pos_embed.zero_()  # a fixed table: make one that only rank 0 can have repaired
    start = {k: v.clone() for k, v in model.named_buffers()}
    model.set_grad_checkpointing(way == 'checkpointing')
    optimizer, ema = create_optimizer(model), ModelEmaV3(model)
    parallel = DistributedDataParallel(model, static_graph=way == 'static_graph')
    chunks = 2 if way == 'accumulation' else 1
    for _ in range(2):  # a static graph is recorded in the first backward pass and used in the second
        model.zero_grad()
        for i, (x, y) in enumerate(zip(images.chunk(chunks), labels.chunk(chunks), strict=True)):
            with parallel.no_sync() if i < chunks - 1 else nullcontext():
                (loss_of(parallel, x, y) / chunks).backward()
    grads = gradients(model)
    optimizer.step()
    ema.update(unwrap_model(parallel), step=1)
    return dict(start=start, grads=grads, state=full(model.state_dict()), ema=full(ema.module.state_dict()),
                fused=can_fuse(images, model, *model.blocks))


def fsdp_step(model: nn.Module, way: str, images: torch.Tensor, labels: torch.Tensor) -> dict[str, object]:
    """Take a step under FSDP2, a unit for the tokens-to-token module, one for each block, and the root for the rest."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    model.set_grad_checkpointing(way == 'fsdp_checkpointing')
    mesh = torch.distributed.init_device_mesh('cpu', (torch.distributed.get_world_size(),))
    for unit in (model.patch_embed, *model.blocks, model):
        fully_shard(unit, mesh=mesh)
    optimizer = create_optimizer(model)
    loss_of(model, images, labels).backward()
    sharded = all(isinstance(p, DTensor) for p in model.parameters())
    grads = gradients(model)
    optimizer.step()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return dict(grads=grads, state=full(state), sharded=sharded)


def train(model: nn.Module, way: str, images: torch.Tensor, labels: torch.Tensor, out: Path) -> dict[str, object]:
    """Train for four epochs of a step: whole, resumed, or with checkpoints and rank 1 killed in epoch 2."""
    rank, last = torch.distributed.get_rank(), str(out / 'last.pth.tar')
    optimizer, start_epoch = create_optimizer(model), 0
    if way == 'resumed':
        start_epoch = resume_checkpoint(model, last, optimizer, log_info=False)
    ema = ModelEmaV3(model)
    if way == 'resumed':
        load_checkpoint(ema.module, last, use_ema=True)
    parallel = DistributedDataParallel(model)
    saver = CheckpointSaver(parallel, optimizer, model_ema=ema, checkpoint_dir=str(out))
    for epoch in range(start_epoch, 4):
        torch.distributed.barrier()  # rank 0 has written its checkpoint
        if way == 'killed' and epoch == 2 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        loss_of(parallel, images, labels).backward()
        optimizer.step()
        ema.update(unwrap_model(parallel), step=epoch + 1)
        if way == 'killed' and rank == 0:
            saver.save_checkpoint(epoch)
    return dict(
        start_epoch=start_epoch, state=model.state_dict(), ema=ema.module.state_dict(),
        moments=optimizer.state_dict()['state'])


def main() -> None:
    data_dir, output, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    init_distributed_device(argparse.Namespace(device='cpu'))
    rank = torch.distributed.get_rank()
    images, labels = load_batch(data_dir, distributed=True)
    for case in cases:
        name, way = case.split('-')
        # DDP hands out rank 0's weights; FSDP shards what each rank has, so that they have to agree
        model = create_model(name, seed=0 if way in FSDP_WAYS else rank)
        step = fsdp_step if way in FSDP_WAYS else ddp_step if way in DDP_WAYS else partial(train, out=Path(output))
        torch.save(dict(step(model, way, images, labels), images=images), Path(output) / f'{case}.{rank}.pt')
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main()
