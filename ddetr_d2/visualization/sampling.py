"""Where a query of deformable attention looks (Deformable DETR, figure 6)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..layers import MSDeformAttn


@dataclass(frozen=True)
class SamplingPoints:
    """What one query of deformable attention looks at, on the CPU.

    Positions are (x, y) in pixels of the image, (0, 0) being its top left corner; points can lie
    outside of the image.

    Attributes:
        reference: (2,) the reference point.
        locations: (M, L, K, 2) the points of each head on each level.
        weights: (M, L, K) attention weights, which sum to 1 over the levels and points of a head.
        cell: (x0, y0, x1, y1) of an encoder's token; None for a query of the decoder.
    """

    reference: Tensor
    locations: Tensor
    weights: Tensor
    cell: tuple[float, float, float, float] | None = None


@torch.no_grad()
def sampling_points(
    attention: MSDeformAttn, arguments: Mapping[str, Any], query: int, size: Tensor
) -> SamplingPoints:
    """The points of one query of the first image.

    Args:
        attention: the module.
        arguments: what its ``forward`` was given, by name.
        query: index of the query.
        size: (width, height) in pixels of what the levels cover, the image and its padding.
    """
    chosen = slice(query, query + 1)
    reference = arguments["reference_points"][:1, chosen]
    position = arguments.get("position")
    locations, weights = attention.sampling(
        arguments["query"][:1, chosen],
        reference,
        arguments["spatial_shapes"],
        None if position is None else position[:1, chosen],
    )
    return SamplingPoints(
        # That of the finest level; on padded images those of other levels can lie beside it.
        reference[0, 0, 0, :2].float().cpu() * size,
        locations[0, 0].float().cpu() * size,
        weights[0, 0].float().cpu(),
    )
