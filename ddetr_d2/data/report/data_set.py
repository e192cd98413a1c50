"""The numbers of one data set, and what training or evaluation makes of its images and boxes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from detectron2.config import CfgNode

from ...errors import UserError
from ..augmentation import resized_shape
from ..coco import CocoAnnotations, check_objects
from ..coco.annotations import Id
from ..coco.suspicions import find_suspicious, repeated_boxes

Role = Literal["training", "test"]

# COCO's limits between small, medium and large objects, in square pixels.
_LARGE, _MEDIUM = 96**2, 32**2
# Pixels in a side of a cell of the finest feature level, as a rule.
TINY = 8


@dataclass
class CocoSizes:
    """Objects by their annotated area: small below 32 x 32 pixels, large from 96 x 96 on."""

    small: int
    medium: int
    large: int


@dataclass
class ClassReport:
    """The objects of a class, and how many images have some; boxes of crowds are apart."""

    id: Id
    name: str
    objects: int
    images: int
    crowds: int
    sizes: CocoSizes


@dataclass
class Distribution:
    """Smallest and largest of some values, and what 5, 50 and 95% of them do not exceed."""

    least: float
    low: float
    median: float
    high: float
    most: float


@dataclass
class LeftOutReport:
    """Boxes that are neither trained on nor evaluated, for one reason."""

    count: int
    first: str


@dataclass
class ResizeReport:
    """Images and objects after the resize of the configuration, in pixels.

    Training draws the shortest side from several; here it is the middle one of them. Random crops
    come on top.

    Attributes:
        shortest_sides: smallest and largest that the configuration allows.
        shortest: the one that these numbers are of; 0 for no resize.
        longest: limit for the longest side.
        image_width: of all images, as the other three.
        image_height: of images.
        image_aspect: width / height of images.
        object_size: square root of width x height of boxes.
        object_aspect: width / height of boxes.
        tiny_objects: those with a side below 8 pixels, a cell of the finest features.
    """

    shortest_sides: tuple[int, int]
    shortest: int
    longest: int
    image_width: Distribution
    image_height: Distribution
    image_aspect: Distribution
    object_size: Distribution | None
    object_aspect: Distribution | None
    tiny_objects: int


@dataclass
class DataSetReport:
    """What is in a data set, in plain numbers and texts; ``dataclasses.asdict`` fits JSON.

    Objects are boxes that can be used and are no crowds.

    Attributes:
        name: of the data set.
        role: "training" or "test".
        json_file: its annotation file.
        image_root: its image folder.
        images: how many there are.
        images_without_objects: those without any.
        annotations: boxes in the file.
        objects: how many there are.
        crowds: boxes of crowds.
        left_out: boxes that cannot be used, by reason.
        changes: how often which liberty was taken in reading the file.
        repeated_objects: those that repeat another one of the same class and image.
        objects_beyond_image: those that reach more than a pixel beyond their image.
        sizes: objects by COCO's sizes.
        classes: in the order of their ids.
        objects_per_image: of all images.
        object_queries: most objects that the model can find.
        detections_per_image: most detections that are kept, and evaluated.
        images_over_queries: those with more objects than queries.
        images_over_detections: those with more objects than detections that are kept.
        resize: after the resize of the configuration.
        suspicions: see :func:`ddetr_d2.data.coco.suspicions.find_suspicious`.
    """

    name: str
    role: Role
    json_file: str
    image_root: str
    images: int
    images_without_objects: int
    annotations: int
    objects: int
    crowds: int
    left_out: dict[str, LeftOutReport]
    changes: dict[str, int]
    repeated_objects: int
    objects_beyond_image: int
    sizes: CocoSizes
    classes: list[ClassReport]
    objects_per_image: Distribution
    object_queries: int
    detections_per_image: int
    images_over_queries: int
    images_over_detections: int
    resize: ResizeReport
    suspicions: list[str]


def describe(annotations: CocoAnnotations, cfg: CfgNode, role: Role) -> DataSetReport:
    """Report on a data set.

    Args:
        annotations: the data set.
        cfg: gives the resize, the object queries and the detections per image.
        role: what the data set is used for, which decides on the resize.
    """
    objects = ~annotations.crowd
    per_image = annotations.objects_per_image()
    boxes, sizes = annotations.boxes[objects], annotations.sizes()[objects]
    beyond = (boxes[:, :2] < -1).any(axis=1) | (boxes[:, :2] + boxes[:, 2:] > sizes + 1).any(axis=1)
    queries = cfg.MODEL.DEFORMABLE_DETR.NUM_QUERIES
    detections = cfg.TEST.DETECTIONS_PER_IMAGE
    classes = _classes(annotations)
    return DataSetReport(
        name=annotations.source.name,
        role=role,
        json_file=annotations.source.json_file,
        image_root=annotations.source.image_root,
        images=len(annotations.images),
        images_without_objects=int((per_image == 0).sum()),
        annotations=annotations.total,
        objects=int(objects.sum()),
        crowds=int(annotations.crowd.sum()),
        left_out={
            reason: LeftOutReport(left.count, left.first)
            for reason, left in annotations.left_out.items()
        },
        changes=dict(annotations.changes),
        repeated_objects=len(repeated_boxes(annotations)),
        objects_beyond_image=int(beyond.sum()),
        sizes=count_sizes(annotations.areas[objects]),
        classes=classes,
        objects_per_image=_distribution(per_image),
        object_queries=queries,
        detections_per_image=detections,
        images_over_queries=int((per_image > queries).sum()),
        images_over_detections=int((per_image > detections).sum()),
        resize=_resize_report(annotations, cfg, role),
        suspicions=_refusal(annotations, queries, role) + find_suspicious(annotations),
    )


def _refusal(annotations: CocoAnnotations, queries: int, role: Role) -> list[str]:
    """Why the data set cannot be used, if that is so."""
    try:
        check_objects(annotations, training=role == "training", max_objects=queries)
    except UserError as error:
        reason = str(error).removeprefix(f"{annotations.source}: ")
        return [f"it is refused as a {role} set: {reason}"]
    return []


def count_sizes(areas: np.ndarray) -> CocoSizes:
    """Objects by COCO's sizes.

    Args:
        areas: (B,) square pixels.
    """
    small, large = int((areas < _MEDIUM).sum()), int((areas >= _LARGE).sum())
    return CocoSizes(small, len(areas) - small - large, large)


def shortest_sides(cfg: CfgNode, role: Role) -> tuple[int, int, int]:
    """Smallest, middle and largest shortest side of images after the resize; 0 for no resize."""
    if role == "test":
        return (cfg.INPUT.MIN_SIZE_TEST,) * 3
    sides = cfg.INPUT.MIN_SIZE_TRAIN
    sides = sorted((sides,) if isinstance(sides, int) else sides)
    if cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range":
        return sides[0], (sides[0] + sides[-1]) // 2, sides[-1]
    return sides[0], sides[len(sides) // 2], sides[-1]


def resized_sizes(annotations: CocoAnnotations, cfg: CfgNode, role: Role) -> np.ndarray:
    """(images, 2) width and height of the images after the resize, see :class:`ResizeReport`."""
    longest = cfg.INPUT.MAX_SIZE_TEST if role == "test" else cfg.INPUT.MAX_SIZE_TRAIN
    shortest = shortest_sides(cfg, role)[1]
    shapes: dict[tuple[int, int], tuple[int, int]] = {}
    for shape in {(image.height, image.width) for image in annotations.images}:
        shapes[shape] = (
            resized_shape(*shape, shortest, longest, cfg.INPUT.RESIZE_RULE) if shortest else shape
        )
    return np.array([shapes[image.height, image.width][::-1] for image in annotations.images])


def resized_objects(annotations: CocoAnnotations, sizes: np.ndarray) -> np.ndarray:
    """(B, 4) boxes of the objects, cut off at the borders of images resized to ``sizes``.

    x, y, width and height are in pixels of the resized images.
    """
    objects = ~annotations.crowd
    original = annotations.sizes()[objects]
    boxes = annotations.boxes[objects]
    low = np.clip(boxes[:, :2], 0, original)
    high = np.clip(boxes[:, :2] + boxes[:, 2:], 0, original)
    scale = sizes[annotations.image_index[objects]] / original
    return np.concatenate((low * scale, (high - low) * scale), axis=1)


def _classes(annotations: CocoAnnotations) -> list[ClassReport]:
    objects, number = ~annotations.crowd, len(annotations.categories)
    category = annotations.category_index[objects]
    areas = annotations.areas[objects]
    counts = {
        "objects": np.bincount(category, minlength=number),
        "crowds": np.bincount(annotations.category_index[~objects], minlength=number),
        "images": np.bincount(
            np.unique(annotations.image_index[objects] * number + category) % number,
            minlength=number,
        ),
    }
    small = np.bincount(category[areas < _MEDIUM], minlength=number)
    large = np.bincount(category[areas >= _LARGE], minlength=number)
    medium = counts["objects"] - small - large
    return [
        ClassReport(
            id,
            name,
            **{key: int(values[index]) for key, values in counts.items()},
            sizes=CocoSizes(int(small[index]), int(medium[index]), int(large[index])),
        )
        for index, (id, name) in enumerate(annotations.categories.items())
    ]


def _resize_report(annotations: CocoAnnotations, cfg: CfgNode, role: Role) -> ResizeReport:
    low, middle, high = shortest_sides(cfg, role)
    sizes = resized_sizes(annotations, cfg, role)
    width, height = resized_objects(annotations, sizes)[:, 2:].T
    return ResizeReport(
        shortest_sides=(low, high),
        shortest=middle,
        longest=cfg.INPUT.MAX_SIZE_TEST if role == "test" else cfg.INPUT.MAX_SIZE_TRAIN,
        image_width=_distribution(sizes[:, 0]),
        image_height=_distribution(sizes[:, 1]),
        image_aspect=_distribution(sizes[:, 0] / sizes[:, 1]),
        object_size=_distribution(np.sqrt(width * height)) if len(width) else None,
        object_aspect=_distribution(width / height) if len(width) else None,
        tiny_objects=int((np.minimum(width, height) < TINY).sum()),
    )


def _distribution(values: np.ndarray | Sequence[float]) -> Distribution:
    return Distribution(*np.percentile(values, (0, 5, 50, 95, 100)).tolist())
