"""From a data set's record to the model's input: reading, augmentation, tensors."""

import copy

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T

from ..errors import UserError
from .images import check_image_size, read_image

_FLIPS = ("horizontal", "vertical", "none")
# The resize before a crop enlarges without a limit for the longest side; this one, times the
# shortest side, is met by strips only and keeps them from filling the memory.
_MAX_ASPECT_RATIO = 10


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's, with at least one pixel a side: it would shrink 1 x 4000 pixels to nothing."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The resize of ``image`` (H, W, ...) to a size that is drawn at random."""
        transform = super().get_transform(image)
        if isinstance(transform, T.ResizeTransform):
            transform.new_h = max(transform.new_h, 1)
            transform.new_w = max(transform.new_w, 1)
        return transform


def build_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The augmentation of the paper's recipe (section 4.1 of DETR), of Detectron2's transforms.

    In training: a flip (``INPUT.RANDOM_FLIP``), half the time a random crop (``INPUT.CROP``, if
    enabled) of the image resized to one of ``INPUT.CROP.MIN_SIZE_TRAIN``, and a resize to one of
    ``INPUT.MIN_SIZE_TRAIN``, at most ``INPUT.MAX_SIZE_TRAIN``. In testing: the resize to
    ``INPUT.MIN_SIZE_TEST``, at most ``INPUT.MAX_SIZE_TEST``.

    Raises:
        UserError: ``INPUT.RANDOM_FLIP`` is unknown.
    """
    if not is_train:
        return [ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice")]
    flip = cfg.INPUT.RANDOM_FLIP
    if flip not in _FLIPS:
        raise UserError(f"INPUT.RANDOM_FLIP is {flip!r}: one of {', '.join(_FLIPS)} is expected")
    augmentations: list[T.Augmentation] = []
    if flip != "none":
        augmentations.append(
            T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")
        )
    if cfg.INPUT.CROP.ENABLED:
        sizes = cfg.INPUT.CROP.MIN_SIZE_TRAIN
        crop = T.AugmentationList(
            [
                ResizeShortestEdge(sizes, _MAX_ASPECT_RATIO * max(sizes), "choice"),
                T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE),
            ]
        )
        augmentations.append(T.RandomApply(crop, prob=0.5))
    augmentations.append(
        ResizeShortestEdge(
            cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
        )
    )
    return augmentations


class DetrDatasetMapper(DatasetMapper):
    """Detectron2's mapper for boxes, with :func:`build_augmentation` and errors naming the file.

    A record becomes a dict with "image", (3, H, W) uint8 of ``INPUT.FORMAT``, and in training
    "instances" with "gt_boxes" (N, 4) in pixels of that image and "gt_classes" (N,). Boxes are
    clipped to the image; those that lie outside it are left out, so N may be 0. "height" and
    "width" are those of the original image.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        """Detectron2's arguments with this project's augmentation."""
        return {
            "is_train": is_train,
            "augmentations": build_augmentation(cfg, is_train),
            "image_format": cfg.INPUT.FORMAT,
        }

    def __call__(self, dataset_dict: dict) -> dict:
        """Map one record of a data set.

        Raises:
            UserError: the image cannot be read or has another size than annotated.
        """
        record = copy.deepcopy(dataset_dict)
        image = read_image(record["file_name"], self.image_format)
        check_image_size(record, image)
        record.setdefault("height", image.shape[0])
        record.setdefault("width", image.shape[1])
        augmented = T.AugInput(image)
        transforms = self.augmentations(augmented)
        image = augmented.image
        record["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            for annotation in record["annotations"]:
                # Detectron2's transforms round towards zero, step by step, what comes as integers.
                annotation["bbox"] = [float(value) for value in annotation["bbox"]]
            self._transform_annotations(record, transforms, image.shape[:2])
        return record
