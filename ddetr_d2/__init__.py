"""DETR and Deformable DETR as a Detectron2 extension."""

import warnings
from typing import Any

with warnings.catch_warnings():
    # Detectron2 and fvcore use it while they are imported, which torch 2.15 warns of.
    warnings.filterwarnings("ignore", "`torch.jit.script` is", FutureWarning)
    from . import modeling  # noqa: F401  registers the meta-architectures

from .config import add_deformable_detr_config, config_file
from .version import __version__

__all__ = ["Detector", "__version__", "add_deformable_detr_config", "config_file"]


def __getattr__(name: str) -> Any:
    """Import :class:`Detector` when it is asked for: data workers and training need none of it."""
    if name == "Detector":
        from .detector import Detector

        return Detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
