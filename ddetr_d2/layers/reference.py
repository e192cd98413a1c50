"""Multi-scale deformable attention in plain PyTorch: the definition the kernels are held to."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import accumulation_dtype, check_inputs, check_level_starts, flat_shapes


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Sequence[Sequence[int]] | Tensor,
    level_start_index: Sequence[int] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """:func:`ms_deform_attn` in plain PyTorch, for any device and floating type.

    Its memory grows with N * Q * M * L * K * D: all sampled values exist at once.
    """
    shapes = flat_shapes(spatial_shapes)
    check_level_starts(level_start_index, shapes)
    check_inputs(value, shapes, sampling_locations, attention_weights)
    batch, _, heads, channels = value.shape
    queries, points = sampling_locations.shape[1], sampling_locations.shape[4]
    dtype = accumulation_dtype(value)
    level_sizes = list(zip(shapes[::2], shapes[1::2], strict=True))

    output = value.new_zeros(batch * heads, channels, queries, dtype=dtype)
    level_tokens = value.split([height * width for height, width in level_sizes], dim=1)
    for level, ((height, width), tokens) in enumerate(zip(level_sizes, level_tokens, strict=True)):
        feature_map = tokens.to(dtype).permute(0, 2, 3, 1)
        feature_map = feature_map.reshape(batch * heads, channels, height, width)
        xy = sampling_locations[:, :, :, level].to(dtype).transpose(1, 2)
        xy = xy.reshape(batch * heads, queries, points, 2)
        weights = attention_weights[:, :, :, level].to(dtype).transpose(1, 2)
        weights = weights.reshape(batch * heads, queries, points)

        x = xy[..., 0] * width - 0.5
        y = xy[..., 1] * height - 0.5
        inside = (x > -1) & (x < width) & (y > -1) & (y < height)
        # Dropped samples move far outside, so that neither they nor their gradients carry a NaN.
        grid = torch.where(inside[..., None], 2 * xy - 1, -3.0)
        weights = torch.where(inside, weights, 0.0)
        samples = F.grid_sample(
            feature_map, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        output = output + (samples * weights[:, None]).sum(-1)
    output = output.view(batch, heads * channels, queries).transpose(1, 2)
    return output.to(value.dtype).contiguous()
