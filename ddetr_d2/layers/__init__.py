"""Layers of Deformable DETR."""

from .ms_deform_attn import MSDeformAttn, ms_deform_attn, ms_deform_attn_reference
from .position_encoding import sine_embedding, sine_position_embedding

__all__ = [
    "MSDeformAttn",
    "ms_deform_attn",
    "ms_deform_attn_reference",
    "sine_embedding",
    "sine_position_embedding",
]
