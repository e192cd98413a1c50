"""Reading and writing weights."""

from .checkpointer import DetrCheckpointer, read_class_names

__all__ = ["DetrCheckpointer", "read_class_names"]
