"""Positions of the tokens: the published sinusoidal table (paper section 3.2)."""
import torch


def sinusoidal_pos_embed(num_positions: int, embed_dim: int, device=None, dtype=None) -> torch.Tensor:
    """Make the sinusoidal table (paper section 3.2; arXiv 1706.03762, section 3.5); position 0 is the class token's.

    Computed in float64 and rounded to float32, as the published table is, before it takes the dtype asked for.

    Args:
        num_positions: Number of positions, 1 + the number of tokens.
        embed_dim: Width of a position's vector.
        device: Device of the result.
        dtype: Dtype of the result.

    Returns:
        Table of shape (1, num_positions, embed_dim): sine in the even channels, cosine in the odd ones.
    """
    channel = torch.arange(embed_dim, dtype=torch.float64, device='cpu')
    inv_wavelength = 10000. ** (-2 * torch.div(channel, 2, rounding_mode='floor') / embed_dim)
    angle = torch.arange(num_positions, dtype=torch.float64, device='cpu')[:, None] * inv_wavelength
    table = torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float().unsqueeze(0)
    return table.to(device=device, dtype=dtype or torch.get_default_dtype())


def join_positions(
        table: torch.Tensor,
        class_token: bool = True,
        reg_tokens: int = 0,
        no_embed_class: bool = False,
) -> torch.Tensor:
    """Return a published table (1, 1 + N, C) as a model with other prefix tokens has it; registers get zeros.

    Args:
        table: Position table with the class token's row first.
        class_token: The model has a class token.
        reg_tokens: Number of register tokens.
        no_embed_class: The model gives positions to the grid alone.
    """
    grid = table[:, 1:]
    if no_embed_class:
        return grid
    return torch.cat([table[:, :int(class_token)], grid.new_zeros(1, reg_tokens, grid.shape[-1]), grid], dim=1)
