"""Layers of Deformable DETR."""

from .attention import MSDeformAttn
from .convolution import scaled_convolution
from .dropout import dropout
from .linear import feed_forward, linear
from .ms_deform_attn import ms_deform_attn
from .position_encoding import sine_embedding, sine_position_embedding
from .reference import ms_deform_attn_reference
from .self_attention import self_attention

__all__ = [
    "MSDeformAttn",
    "dropout",
    "feed_forward",
    "linear",
    "ms_deform_attn",
    "ms_deform_attn_reference",
    "scaled_convolution",
    "self_attention",
    "sine_embedding",
    "sine_position_embedding",
]
