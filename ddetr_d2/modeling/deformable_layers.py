"""Layers with deformable attention (Deformable DETR, section 4.1 and appendix A.4)."""

import torch
from torch import Tensor

from ..layers import MSDeformAttn
from .feature_levels import FeatureLevels
from .transformer import DecoderLayer, EncoderLayer, TransformerSize


def _attention(size: TransformerSize, num_levels: int, num_points: int) -> MSDeformAttn:
    return MSDeformAttn(size.hidden_dim, size.num_heads, num_levels, num_points)


class DeformableEncoderLayer(EncoderLayer):
    """Each token looks around its own centre, on all levels."""

    def __init__(self, size: TransformerSize, num_levels: int, num_points: int):
        super().__init__(size, _attention(size, num_levels, num_points))

    def attend(self, tokens: Tensor, levels: FeatureLevels) -> Tensor:
        """See :meth:`EncoderLayer.attend`."""
        return self.self_attn(
            tokens,
            levels.reference_points,
            tokens,
            levels.spatial_shapes,
            levels.level_start_index,
            levels.padding_mask,
            levels.position,
        )


class SeparateLevelsEncoderLayer(DeformableEncoderLayer):
    """Each token looks around its own centre, on its own level: what the paper's ablation (table 2)
    calls multi-scale inputs without multi-scale attention."""

    def __init__(self, size: TransformerSize, num_points: int):
        super().__init__(size, 1, num_points)

    def attend(self, tokens: Tensor, levels: FeatureLevels) -> Tensor:
        """See :meth:`EncoderLayer.attend`."""
        pieces = (
            super(SeparateLevelsEncoderLayer, self).attend(*x) for x in levels.separate(tokens)
        )
        return torch.cat([*pieces], dim=1)


class DeformableDecoderLayer(DecoderLayer):
    """Each query looks around its reference, on all levels."""

    def __init__(self, size: TransformerSize, num_levels: int, num_points: int):
        super().__init__(size, _attention(size, num_levels, num_points))

    def attend(
        self, query: Tensor, reference: Tensor | None, memory: Tensor, levels: FeatureLevels
    ) -> Tensor:
        """See :meth:`DecoderLayer.attend`."""
        assert reference is not None  # Deformable DETR's queries have one
        ratios = levels.valid_ratios[:, None].repeat(1, 1, 1, reference.shape[-1] // 2)
        return self.cross_attn(
            query,
            reference[:, :, None] * ratios,
            memory,
            levels.spatial_shapes,
            levels.level_start_index,
            levels.padding_mask,
        )
