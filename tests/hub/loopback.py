"""What the loopback tests share: weights to serve, the hosts, the end of a client."""
import argparse
import io
import json
import subprocess
from functools import cached_property
from typing import Any

import safetensors.torch
import timm
import torch
from hub_client import digest
from hub_server import FileServer, HubServer

# arguments that make any performer small, and one of 17 MB
TINY = dict(embed_dim=64, depth=1, num_heads=4, mlp_ratio=2., img_size=32, num_classes=1000)
BIG = dict(embed_dim=256, depth=7, num_heads=4, mlp_ratio=2., num_classes=1000)


class Weights:
    """A model's weights as files: what the Hub would hold, and a publisher's pickle of the same."""

    def __init__(self, seed: int, architecture: str = 't2t_vit_7', **kwargs: Any) -> None:
        torch.manual_seed(seed)
        self.kwargs = kwargs
        self.state_dict = timm.create_model(architecture, **kwargs).state_dict()
        self.safetensors = safetensors.torch.save(self.state_dict)
        self.digest = digest(self.state_dict)

    @cached_property
    def pickle(self) -> bytes:
        """The same weights as a publisher's pickle."""
        return _pickled(state_dict=self.state_dict)

    @cached_property
    def training_pickle(self) -> bytes:
        """The same weights as the authors published theirs: averaged beside plain ones, DDP's prefix, arguments."""
        return _pickled(
            state_dict={k: torch.zeros_like(v) for k, v in self.state_dict.items()},
            state_dict_ema={f'module.{k}': v for k, v in self.state_dict.items()},
            args=argparse.Namespace(lr=5e-4, model='t2t'),
        )


def _pickled(**checkpoint: Any) -> bytes:
    file = io.BytesIO()
    torch.save(checkpoint, file)
    return file.getvalue()


class Hosts:
    """The Hub, its storage and a release host."""

    def __init__(self, hub: HubServer, release: FileServer) -> None:
        self.hub, self.storage, self.release = hub, hub.storage, release


def finish(process: subprocess.Popen) -> list:
    """Wait for a client and return the results of its stages."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return json.loads(process.result.read_text())
