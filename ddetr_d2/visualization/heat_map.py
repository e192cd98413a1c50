"""Where a query of dense attention looks (DETR, figures 3 and 6)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class HeatMap:
    """What one query of dense attention looks at, on the CPU.

    Attributes:
        weights: (H, W) attention weight of each token, the mean over the heads; they sum to 1.
        size: (width, height) in pixels of what the tokens cover, the image at the top left and its
            padding. All tokens are equally large.
        cell: (x0, y0, x1, y1) of an encoder's token, in pixels; None for a query of the decoder.
    """

    weights: Tensor
    size: tuple[float, float]
    cell: tuple[float, float, float, float] | None = None


@torch.no_grad()
def heat_map(
    attention: nn.MultiheadAttention,
    arguments: Mapping[str, Any],
    query: int,
    shape: tuple[int, int],
    size: Tensor,
) -> HeatMap:
    """The weights of one query of the first image, computed anew.

    Args:
        attention: the module, in evaluation mode.
        arguments: what its ``forward`` was given, by name.
        query: index of the query.
        shape: (H, W) of the level that the tokens come from.
        size: (width, height) in pixels of what the level covers, the image and its padding.
    """
    padding_mask = arguments.get("key_padding_mask")
    _, weights = attention(
        arguments["query"][:1, query : query + 1],
        arguments["key"][:1],
        arguments["value"][:1],
        key_padding_mask=None if padding_mask is None else padding_mask[:1],
        need_weights=True,
        average_attn_weights=True,
    )
    return HeatMap(weights[0, 0].float().cpu().view(*shape), tuple(size.tolist()))
