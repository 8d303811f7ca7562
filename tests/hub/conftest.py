"""Fixtures: a checkpoint, loopback hosts, and processes that load from them."""
from pathlib import Path

import published
import pytest
import torch
from loopback import hosts, start_client  # noqa: F401


@pytest.fixture
def tiny_file(tmp_path: Path) -> Path:
    """A state dict of test_t2t_vit with 10 classes, alone in a folder."""
    torch.save(published.tiny(num_classes=10), tmp_path / 'tiny.pth')
    return tmp_path / 'tiny.pth'
