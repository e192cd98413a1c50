"""The models: backbone features, transformer, heads, matching and loss."""

from . import backbone  # noqa: F401  registers the backbones
from .deformable_detr import DeformableDETR
from .detr import DETR
from .inference import inference_dtype, prepare_for_inference
from .set_detector import SetDetector

__all__ = ["DETR", "DeformableDETR", "SetDetector", "inference_dtype", "prepare_for_inference"]
