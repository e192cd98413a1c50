"""Sine position encodings (Vaswani et al., 2017, in the two-dimensional form of DETR)."""

import math

import torch
from torch import Tensor

TEMPERATURE = 10000


def sine_embedding(positions: Tensor, num_features: int) -> Tensor:
    """Embed each coordinate by sines and cosines of geometrically falling frequencies.

    Args:
        positions: (..., D) coordinates as fractions of the image, 0 to 1.
        num_features: features F per coordinate, even.

    Returns:
        (..., D * F), the F features of the first coordinate first; within them sines stand at
        even places and cosines at odd ones.
    """
    exponents = torch.arange(num_features // 2, dtype=positions.dtype, device=positions.device)
    periods = TEMPERATURE ** (2 * exponents / num_features)
    angles = positions.unsqueeze(-1) * (2 * math.pi) / periods
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-3)


def sine_position_embedding(
    padding_mask: Tensor,
    num_features: int,
    dtype: torch.dtype = torch.float32,
    pixel_center: float = 0.5,
) -> Tensor:
    """Embed the pixel positions of padded images.

    Positions count unpadded pixels, from their centres, relative to the unpadded size.

    Args:
        padding_mask: (N, H, W) bool, True on padding.
        num_features: features F in all, half of them for y and half for x.
        dtype: floating type that it is computed in.
        pixel_center: place within a pixel that is its position, 0 to 1; DETR takes the far corner.

    Returns:
        (N, H, W, F) of ``dtype``, the features of y first.
    """
    valid = (~padding_mask).to(dtype)
    y = valid.cumsum(1)
    x = valid.cumsum(2)
    y = (y - (1 - pixel_center)) / (y[:, -1:, :] + 1e-6)
    x = (x - (1 - pixel_center)) / (x[:, :, -1:] + 1e-6)
    return sine_embedding(torch.stack((y, x), dim=-1), num_features // 2)
