"""The model: backbone features, deformable transformer, heads, matching and loss."""

from .deformable_detr import DeformableDETR

__all__ = ["DeformableDETR"]
