"""The models: backbone features, transformer, heads, matching and loss."""

from . import backbone  # noqa: F401  registers the backbones
from .deformable_detr import DeformableDETR
from .detr import DETR
from .inference import prepare_for_inference
from .set_detector import SetDetector

__all__ = ["DETR", "DeformableDETR", "SetDetector", "prepare_for_inference"]
