"""The sinusoidal position table."""
import pytest
import torch

from t2t_timm.layers import sinusoidal_pos_embed


def test_sinusoidal_table():
    table = sinusoidal_pos_embed(5, 6, dtype=torch.float64)[0]
    for position in range(5):
        for channel in range(6):
            angle = torch.tensor(position / 10000 ** (2 * (channel // 2) / 6), dtype=torch.float64)
            expected = angle.cos() if channel % 2 else angle.sin()
            assert table[position, channel].item() == pytest.approx(expected.item(), abs=1e-7)
