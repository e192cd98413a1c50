"""Multi-scale deformable attention for files that run without ddetr_d2: of standard operators, or
as one operator that a runtime has by an extension.

The functions are called as :func:`ddetr_d2.layers.ms_deform_attn` is and compute the same
(paper, equation 3) for finite locations. They check nothing and do not branch on sizes, which are
symbols while a model is exported and tensors while it is traced.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers import ms_deform_attn

# Of the operator that ONNX files of sample_with_extension have.
ONNX_DOMAIN = "ddetr_d2"


def sample_with_grid_sample(
    value: Tensor,
    spatial_shapes: Sequence[Sequence[int]],
    level_start_index: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """One ``grid_sample`` per level.

    Args:
        value: (N, S, M, D), S tokens of all levels one after the other, M heads of D channels.
        spatial_shapes: (height, width) in pixels of each level.
        level_start_index: first token of each level.
        sampling_locations: (N, Q, M, L, K, 2), (x, y) with (0, 0) the top left and (1, 1) the
            bottom right corner of a level; finite.
        attention_weights: (N, Q, M, L, K).

    Returns:
        (N, Q, M * D)
    """
    batch, _, heads, channels = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    # (N, M, D, S), cut into levels
    feature_maps = value.permute(0, 2, 3, 1).split([h * w for h, w in spatial_shapes], dim=-1)
    # Queries last: neighbouring ones look at neighbouring pixels, and sums run over whole rows.
    grid = 2 * sampling_locations.permute(0, 2, 3, 4, 1, 5) - 1  # (N, M, L, K, Q, 2)
    weights = attention_weights.permute(0, 2, 3, 4, 1)
    output = value.new_zeros(())
    for level, ((height, width), feature_map) in enumerate(
        zip(spatial_shapes, feature_maps, strict=True)
    ):
        samples = F.grid_sample(
            feature_map.reshape(batch * heads, channels, height, width),
            grid[:, :, level].reshape(batch * heads, points, queries, 2),
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        level_weights = weights[:, :, level].reshape(batch * heads, 1, points, queries)
        output = output + (samples * level_weights).sum(2)  # (N * M, D, Q)
    return output.reshape(batch, heads * channels, queries).transpose(1, 2)


def sample_with_gather(
    value: Tensor,
    spatial_shapes: Sequence[Sequence[int]],
    level_start_index: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """One gather per level, of the four pixels around each sample.

    A pixel outside its level is read from the level's border, with a weight of zero. Arguments and
    result are those of :func:`sample_with_grid_sample`.
    """
    batch, tokens, heads, channels = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    rows = value.reshape(batch * tokens * heads, channels)
    image = torch.arange(batch, device=value.device)[:, None, None, None, None]
    head = torch.arange(heads, device=value.device)[:, None, None]
    output = value.new_zeros(())
    for level, ((height, width), start) in enumerate(
        zip(spatial_shapes, level_start_index, strict=True)
    ):
        x, weight_x = _neighbours(sampling_locations[:, :, :, level, :, 0], width)
        y, weight_y = _neighbours(sampling_locations[:, :, :, level, :, 1], height)
        token = start + y[..., :, None] * width + x[..., None, :]  # (N, Q, M, K, 2, 2)
        row = (image * tokens + token.flatten(-2)) * heads + head  # (N, Q, M, K, 4)
        samples = rows.index_select(0, row.reshape(-1))
        samples = samples.reshape(batch, queries, heads, points * 4, channels)
        weights = weight_y[..., :, None] * weight_x[..., None, :]
        weights = weights * attention_weights[:, :, :, level, :, None, None]
        weights = weights.reshape(batch, queries, heads, 1, points * 4)
        output = output + weights @ samples  # (N, Q, M, 1, D)
    return output.reshape(batch, queries, heads * channels)


def _neighbours(location: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The two pixels around each location along one axis, and their bilinear weights.

    ``location`` (...) is a fraction of the axis, ``size`` its length in pixels. Both results are
    (..., 2); pixels outside the axis are moved to its end and weigh nothing.
    """
    position = location * size - 0.5
    low = position.floor()
    pixels = torch.stack((low, low + 1), dim=-1)
    weights = 1 - (position[..., None] - pixels).abs()
    inside = (pixels >= 0) & (pixels < size)
    # Clamped before the conversion: a far location need not fit into an integer.
    return pixels.clamp(0, size - 1).long(), weights * inside.to(weights.dtype)


def sample_with_extension(
    value: Tensor,
    spatial_shapes: Sequence[Sequence[int]],
    level_start_index: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The compiled operator here, the operator MSDeformAttn of the domain ddetr_d2 in an ONNX file.

    Its inputs are value, the levels' heights and widths (L, 2) of int64, locations and weights.
    Arguments and result are those of :func:`sample_with_grid_sample`.
    """
    shapes = torch.stack(
        [torch.stack([torch.as_tensor(length) for length in shape]) for shape in spatial_shapes]
    )
    return _MSDeformAttnNode.apply(value, shapes, sampling_locations, attention_weights)


class _MSDeformAttnNode(torch.autograd.Function):
    """What :func:`torch.onnx.export` asks for the node to write."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor
    ) -> Tensor:
        sizes = shapes.tolist()
        starts = [0]
        for height, width in sizes[:-1]:
            starts.append(starts[-1] + height * width)
        return ms_deform_attn(value, sizes, starts, locations, weights)

    @staticmethod
    def symbolic(g: Any, value: Any, shapes: Any, locations: Any, weights: Any) -> Any:
        node = g.op(f"{ONNX_DOMAIN}::MSDeformAttn", value, shapes, locations, weights)
        return node.setType(value.type().with_sizes([None, None, None]))
