"""Deformable DETR as a Detectron2 extension."""

from . import modeling  # noqa: F401  registers the meta-architecture
from .config import add_deformable_detr_config

__version__ = "0.1.0"
__all__ = ["add_deformable_detr_config"]
