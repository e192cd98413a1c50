"""The module of multi-scale deformable attention (paper, section 4.1, equation 3)."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .linear import linear, two_linears
from .ms_deform_attn import can_fuse, ms_deform_attn, ms_deform_attn_fused
from .precision import at_least_float32


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention with its projections (equation 3 of the paper).

    Args:
        embed_dim: C, channels of queries, values and output.
        num_heads: M, a divisor of C.
        num_levels: L.
        num_points: K, samples per head and level.
    """

    def __init__(
        self, embed_dim: int = 256, num_heads: int = 8, num_levels: int = 4, num_points: int = 4
    ):
        super().__init__()
        for name, number in (
            ("embed_dim", embed_dim),
            ("num_heads", num_heads),
            ("num_levels", num_levels),
            ("num_points", num_points),
        ):
            if number < 1:
                raise ValueError(f"MSDeformAttn: {name} must be at least 1, got {number}")
        if embed_dim % num_heads:
            raise ValueError(
                f"MSDeformAttn: embed_dim must be a multiple of num_heads = {num_heads}, "
                f"got {embed_dim}"
            )
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_levels = num_levels
        self.num_points = num_points
        # What samples and sums. Export puts formulations of standard operators in its place.
        self.operator: Callable[..., Tensor] = ms_deform_attn

        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dim, samples * 2)
        self.attention_weights = nn.Linear(embed_dim, samples)
        self.value_proj = nn.Linear(embed_dim, embed_dim)
        self.output_proj = nn.Linear(embed_dim, embed_dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Head m starts with the direction 2 pi m / M and distances 1 to K (paper, A.4)."""
        angle = torch.arange(self.num_heads, dtype=torch.float32) * (2 * math.pi / self.num_heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(dim=-1, keepdim=True)
        distance = torch.arange(1, self.num_points + 1, dtype=torch.float32)
        offsets = direction[:, None, None, :] * distance[None, None, :, None]  # (M, 1, K, 2)
        offsets = offsets.expand(-1, self.num_levels, -1, -1)

        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        value_tokens: Tensor,
        spatial_shapes: Sequence[Sequence[int]] | Tensor,
        level_start_index: Sequence[int] | Tensor,
        padding_mask: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        """Let each query look at its learned points in all levels.

        Args:
            query: (N, Q, C), content plus position, or content alone with ``position``.
            reference_points: (N, Q, L, 2) points (x, y), from which offsets are counted in pixels
                of the level, or (N, Q, L, 4) boxes (cx, cy, w, h), from whose centre offsets are
                counted in w / 2K and h / 2K. All relative to the level's width and height.
            value_tokens: (N, S, C), without position.
            spatial_shapes: (height, width) in pixels of each level, ints or an integer tensor
                (L, 2).
            level_start_index: first token of each level, ints or an integer tensor (L,).
            padding_mask: (N, S), True where a token is padding and is to count as zero; or None.
            position: (N or 1, Q, C), what is added to the query; or None.

        Returns:
            (N, Q, C)

        Raises:
            ValueError: an argument has the wrong shape, type or device; the message names it.
        """
        if isinstance(spatial_shapes, Tensor):
            spatial_shapes = spatial_shapes.tolist()
        if padding_mask is not None and (
            padding_mask.shape != value_tokens.shape[:2] or padding_mask.dtype != torch.bool
        ):
            raise ValueError(
                "MSDeformAttn: padding_mask: expected a bool tensor of shape "
                f"{tuple(value_tokens.shape[:2])} as value_tokens has, "
                f"got {padding_mask.dtype} {tuple(padding_mask.shape)}"
            )
        offsets, logits = self._offsets_and_logits(
            query, position, reference_points, spatial_shapes
        )
        value = linear(value_tokens, self.value_proj)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0.0)
        # Not by unflatten: the ONNX export of a trace takes its sizes for constants.
        value = value.view(*value.shape[:2], self.num_heads, -1)
        if self.operator is ms_deform_attn and can_fuse(value):
            output = ms_deform_attn_fused(
                value, spatial_shapes, level_start_index, reference_points, offsets, logits
            )
        else:
            locations = self._locations(offsets, reference_points, spatial_shapes)
            weights = self._softmax(logits)
            output = self.operator(value, spatial_shapes, level_start_index, locations, weights)
        return linear(output, self.output_proj)

    def sampling(
        self,
        query: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[Sequence[int]],
        position: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Where each query looks, and with which weights; arguments as in :meth:`forward`.

        Returns:
            locations (N, Q, M, L, K, 2) as fractions (x, y) of a level's width and height, and
            weights (N, Q, M, L, K), which sum to 1 over the levels and points of a head.

        Raises:
            ValueError: an argument has the wrong shape; the message names it.
        """
        offsets, logits = self._offsets_and_logits(
            query, position, reference_points, spatial_shapes
        )
        locations = self._locations(offsets, reference_points, spatial_shapes)
        return locations, self._softmax(logits)

    def _offsets_and_logits(
        self,
        query: Tensor,
        position: Tensor | None,
        reference_points: Tensor,
        spatial_shapes: Sequence[Sequence[int]],
    ) -> tuple[Tensor, Tensor]:
        """Offsets (N, Q, M, L, K, 2) and weights before the softmax (N, Q, M, L, K)."""
        batch, queries, _ = query.shape
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        if len(spatial_shapes) != levels:
            raise ValueError(
                f"MSDeformAttn: spatial_shapes: expected {levels} levels, got {spatial_shapes}"
            )
        if reference_points.shape[:-1] != (batch, queries, levels) or (
            reference_points.shape[-1] not in (2, 4)
        ):
            raise ValueError(
                f"MSDeformAttn: reference_points: expected shape ({batch}, {queries}, {levels}, "
                f"2 or 4), got {tuple(reference_points.shape)}"
            )
        layers = self.sampling_offsets, self.attention_weights
        offsets, logits = two_linears(query, position, *layers)
        return (
            offsets.view(batch, queries, heads, levels, points, 2),
            logits.view(batch, queries, heads, levels, points),
        )

    def _locations(
        self, offsets: Tensor, reference_points: Tensor, spatial_shapes: Sequence[Sequence[int]]
    ) -> Tensor:
        # Shapes from the modules' own numbers: as sizes of tensors, ONNX would compute them.
        batch, queries = reference_points.shape[:2]
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        if reference_points.shape[-1] == 2:
            # One row of L * K * 2 per head: broadcasting over pairs is slow in other runtimes.
            sizes = _level_sizes(spatial_shapes, reference_points)
            sizes = sizes[:, None].expand(-1, points, -1).reshape(-1)
            reference = reference_points[:, :, :, None].expand(-1, -1, -1, points, -1)
            reference = reference.reshape(batch, queries, 1, levels * points * 2)
            locations = reference + offsets.view(batch, queries, heads, -1) / sizes
            return locations.view(batch, queries, heads, levels, points, 2)
        reference = reference_points[:, :, None, :, None, :]  # (N, Q, 1, L, 1, 4)
        return reference[..., :2] + offsets / points * reference[..., 2:] * 0.5

    def _softmax(self, logits: Tensor) -> Tensor:
        """Over the levels and points of each head, (N, Q, M, L, K)."""
        batch, queries = logits.shape[:2]
        heads, levels, points = self.num_heads, self.num_levels, self.num_points
        if torch.is_autocast_enabled(logits.device.type):
            # In float32, as the operator takes the weights, it is faster as well.
            logits = logits.to(at_least_float32(logits.dtype))
        weights = logits.view(batch, queries, heads, levels * points).softmax(-1)
        return weights.view(batch, queries, heads, levels, points)


def _level_sizes(spatial_shapes: Sequence[Sequence[int]], like: Tensor) -> Tensor:
    """(width, height) of each level as a tensor (L, 2) with the type and device of ``like``."""
    sizes: list[list[Any]] = [[width, height] for height, width in spatial_shapes]
    if isinstance(sizes[0][0], Tensor):
        # In a trace, into which torch.tensor would write their present values.
        return torch.stack([torch.stack(size) for size in sizes]).to(like)
    if type(like) is Tensor and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        return _kept_level_sizes(tuple(map(tuple, sizes)), like.dtype, like.device)
    return torch.tensor(sizes, dtype=like.dtype).to(like.device, non_blocking=True)


@functools.lru_cache(maxsize=256)
def _kept_level_sizes(
    sizes: tuple[tuple[int, int], ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Kept, since a copy to a GPU in every layer costs time and cannot be in a CUDA graph."""
    with torch.inference_mode(False):  # Training cannot use tensors of inference mode.
        return torch.tensor(sizes, dtype=dtype).to(device, non_blocking=True)
