"""Data: sets out of the configuration, images, augmentation, and the synthetic set."""

from .datasets import (
    coco_set,
    data_set_classes,
    infer_num_classes,
    load_records,
    register_datasets,
)
from .images import read_image
from .mapper import DetrDatasetMapper, build_augmentation

__all__ = [
    "DetrDatasetMapper",
    "build_augmentation",
    "coco_set",
    "data_set_classes",
    "infer_num_classes",
    "load_records",
    "read_image",
    "register_datasets",
]
