"""Data: sets out of the configuration, images, augmentation, and the synthetic set."""

from ddetr_d2.data.datasets import infer_num_classes, register_datasets
from ddetr_d2.data.images import read_image
from ddetr_d2.data.mapper import DetrDatasetMapper, build_augmentation

__all__ = [
    "DetrDatasetMapper",
    "build_augmentation",
    "infer_num_classes",
    "read_image",
    "register_datasets",
]
