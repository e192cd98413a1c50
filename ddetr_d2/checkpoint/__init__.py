"""Reading and writing weights."""

from .checkpointer import DetrCheckpointer, read_class_names
from .run_folder import newest_checkpoint

__all__ = ["DetrCheckpointer", "newest_checkpoint", "read_class_names"]
