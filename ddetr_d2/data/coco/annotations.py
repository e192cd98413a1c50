"""The normal form of a COCO instances file: what the rest of the project sees of it."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from detectron2.structures import BoxMode

from ..wording import agreeing, counted
from .rows import CocoSource

Id = int | str


@dataclass(frozen=True)
class CocoImage:
    """An image of a data set; width and height are those of the upright image, in pixels."""

    id: Id
    file_name: str
    path: str
    width: int
    height: int


@dataclass
class LeftOut:
    """Boxes that are not used for one reason: how many, and the first of them in words."""

    count: int
    first: str


@dataclass
class CocoAnnotations:
    """A data set of boxes, made by :func:`ddetr_d2.data.coco.read_annotations`.

    There is a row for each box that can be used; boxes lie in the upright image.

    Attributes:
        source: the files.
        categories: names of the classes by category id, in ascending order of the ids.
        images: in the order of the file.
        image_index: (B,) int, index of each box's image in ``images``.
        category_index: (B,) int, index of each box's class in ``categories``.
        boxes: (B, 4) float64 x, y, width, height in pixels.
        areas: (B,) float64 square pixels, by which COCO tells small from large objects.
        crowd: (B,) bool, the box is of a group of objects.
        has_annotations: False if the file has none at all, as that of COCO's test-dev.
        total: boxes in the file.
        left_out: boxes of the file that are not among the rows, by reason.
        changes: how often which liberty was taken in reading the file, in words.
    """

    source: CocoSource
    categories: dict[Id, str]
    images: list[CocoImage]
    image_index: np.ndarray
    category_index: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    has_annotations: bool = True
    total: int = 0
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    changes: Counter[str] = field(default_factory=Counter)

    def sizes(self) -> np.ndarray:
        """(B, 2) width and height of each box's image."""
        sizes = np.array([(image.width, image.height) for image in self.images], dtype=float)
        return sizes.reshape(-1, 2)[self.image_index]

    def objects_per_image(self) -> np.ndarray:
        """(images,) int, boxes that are no crowds."""
        return np.bincount(self.image_index[~self.crowd], minlength=len(self.images))

    def objects_per_class(self) -> np.ndarray:
        """(categories,) int, boxes that are no crowds."""
        return np.bincount(self.category_index[~self.crowd], minlength=len(self.categories))

    def records(self, class_of: Mapping[Id, int]) -> list[dict]:
        """The data set as Detectron2's loaders take it, a dict for each image.

        Args:
            class_of: the model's class of each category id; boxes of others are left out.
        """
        records: list[dict] = [
            {
                "file_name": image.path,
                "image_id": image.id,
                "width": image.width,
                "height": image.height,
                "annotations": [],
            }
            for image in self.images
        ]
        classes = [class_of.get(category) for category in self.categories]
        for image, category, box, crowd in zip(
            self.image_index.tolist(),
            self.category_index.tolist(),
            self.boxes.tolist(),
            self.crowd.tolist(),
            strict=True,
        ):
            if classes[category] is not None:
                records[image]["annotations"].append(
                    {
                        "bbox": box,
                        "bbox_mode": BoxMode.XYWH_ABS,
                        "category_id": classes[category],
                        "iscrowd": int(crowd),
                    }
                )
        return records

    def as_coco(self) -> dict:
        """The data set as a COCO instances file holds it, annotations numbered from 1.

        ``annotations`` is absent if the file has none at all.
        """
        ids = list(self.categories)
        content: dict = {
            "info": {},
            "images": [
                {
                    "id": image.id,
                    "file_name": image.file_name,
                    "width": image.width,
                    "height": image.height,
                }
                for image in self.images
            ],
            "categories": [{"id": id, "name": name} for id, name in self.categories.items()],
        }
        if self.has_annotations:
            content["annotations"] = [
                {
                    "id": number,
                    "image_id": self.images[image].id,
                    "category_id": ids[category],
                    "bbox": box,
                    "area": area,
                    "iscrowd": int(crowd),
                }
                for number, (image, category, box, area, crowd) in enumerate(
                    zip(
                        self.image_index.tolist(),
                        self.category_index.tolist(),
                        self.boxes.tolist(),
                        self.areas.tolist(),
                        self.crowd.tolist(),
                        strict=True,
                    ),
                    start=1,
                )
            ]
        return content

    def summary(self) -> str:
        """What was left out and what was changed in reading the file, in one sentence; maybe ''."""
        parts = []
        if self.left_out:
            count = sum(reason.count for reason in self.left_out.values())
            reasons = "; ".join(
                f"{left.count} {agreeing(left.count, reason)}, the first: {left.first}"
                for reason, left in self.left_out.items()
            )
            parts.append(
                f"{count} of {counted(self.total, 'box', 'boxes')} "
                f"{agreeing(count, 'are left out')} of training and evaluation: {reasons}"
            )
        parts += [f"{change}: {count}" for change, count in self.changes.items()]
        return "; ".join(parts)
