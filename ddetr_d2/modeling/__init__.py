"""The model: backbone features, deformable transformer, heads, matching and loss."""

from . import backbone  # noqa: F401  registers the backbones
from .deformable_detr import DeformableDETR
from .inference import prepare_for_inference

__all__ = ["DeformableDETR", "prepare_for_inference"]
