"""Images on which a soft split that subtracts late is wrong: flat regions, of every kind that photos and scans have."""
from typing import Dict

import torch


def flat_images(size: int, in_chans: int = 3) -> Dict[str, torch.Tensor]:
    """Return images with flat regions, float64 that float32 holds exactly: name to (1, in_chans, size, size).

    Values are those of normalized images; 'half_*' are of mean and standard deviation 0.5, all others up to about
    ImageNet's white, 2.64.
    """
    generator = torch.Generator().manual_seed(in_chans * 1009 + size)

    def noise(*shape):
        return torch.randn(1, *(shape or (in_chans, size, size)), generator=generator, dtype=torch.float64)

    def full(value):
        return torch.full((1, in_chans, size, size), value, dtype=torch.float64)

    line = torch.linspace(-2., 2., size, dtype=torch.float64)
    pixel = torch.arange(size)
    colours = torch.tensor([2.2489, 2.4286, 2.64, 2.3, 2.5], dtype=torch.float64)
    colours = colours.repeat(in_chans // 5 + 1)[:in_chans].view(1, -1, 1, 1)
    inner = slice(size // 4, size - size // 4)
    images = {
        'constant': full(2.6),
        'zero': full(0.),
        'one_per_channel': full(0.) + colours,
        'near_constant': 2.2 + 1e-3 * noise(),
        'nearer_constant': 2.2 + 1e-4 * noise(),
        'ramp': full(0.) + line,
        'ramp_down_with_noise': full(0.) + line.view(-1, 1) + 1e-3 * noise(),
        'diagonal_ramp': full(0.) + (line + line.view(-1, 1)) / 2,
        'stripes': full(0.) + torch.where(pixel % 8 < 4, 2.2, -1.8),
        'thin_stripes': full(0.) + torch.where(pixel % 2 == 0, 2.2, 2.1).view(-1, 1),
        'jpeg': (noise(in_chans, size // 8 + 1, size // 8 + 1).repeat_interleave(8, 2).repeat_interleave(8, 3)
                 [..., :size, :size] + 0.02 * torch.cos(torch.pi * (2 * pixel + 1) * 3 / 16)),
        'checks': full(0.) + torch.where((pixel // 16 + pixel.view(-1, 1) // 16) % 2 == 0, 2.6, -2.1),
        'one_pixel': full(2.4),
        'half_white': full(1.),
        'half_grey': 1 / 255 + torch.round(noise() * 0.6) * 2 / 255,
    }
    images['one_pixel'][..., size // 2, size // 3] = -1.
    images['half_white'][..., inner, inner] = (0.5 * noise())[..., inner, inner].clamp(-1., 1.)
    for offset in range(4):  # of an edge against the cells of 4 x 4 pixels, flat on both sides
        edge = size // 8 * 4 + offset
        images[f'edge_{offset}'] = full(2.2) - 0.5 * (pixel >= edge)
        images[f'corner_{offset}'] = full(-1.9) + 4. * ((pixel >= edge) & (pixel >= edge).view(-1, 1))
    for name, colour in {'white': colours, 'black': -colours}.items():
        images[f'{name}_around_noise'] = full(0.) + colour
        images[f'{name}_around_noise'][..., inner, inner] = noise()[..., inner, inner]
    return {name: image.float().double() for name, image in images.items()}
