"""Data sets in COCO format: their normal form, and how files are read into it."""

from .annotations import CocoAnnotations, CocoImage
from .reading import check_objects, read_annotations, read_class_names
from .rows import CocoSource

__all__ = [
    "CocoAnnotations",
    "CocoImage",
    "CocoSource",
    "check_objects",
    "read_annotations",
    "read_class_names",
]
