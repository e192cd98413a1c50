"""From a data set's record to the model's input: reading, augmentation, tensors."""

import copy

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T

from .augmentation import build_augmentation
from .images import check_image_size, read_image


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
