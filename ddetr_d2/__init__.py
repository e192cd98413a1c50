"""Deformable DETR as a Detectron2 extension."""

from . import modeling  # noqa: F401  registers the meta-architecture
from .config import add_deformable_detr_config, config_file
from .version import __version__

__all__ = ["__version__", "add_deformable_detr_config", "config_file"]
