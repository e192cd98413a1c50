"""Data: sets out of the configuration, images, augmentation, and the synthetic set."""

from .datasets import infer_num_classes, register_datasets
from .images import read_image
from .mapper import DetrDatasetMapper, build_augmentation

__all__ = [
    "DetrDatasetMapper",
    "build_augmentation",
    "infer_num_classes",
    "read_image",
    "register_datasets",
]
