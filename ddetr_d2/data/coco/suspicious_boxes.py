"""Warnings about boxes that are no x, y, width, height in pixels of their image."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..wording import agreeing, counted
from .annotations import CocoAnnotations

# Of fewer boxes some fit another layout by chance.
_ENOUGH_BOXES = 10


@dataclass
class Objects:
    """The boxes of a data set that are no crowds, at least one.

    Attributes:
        rows: (B,) their rows in the data set.
        boxes: (B, 4) x, y, width, height.
        image: (B,) index of the image.
        category: (B,) index of the class.
        sizes: (B, 2) width and height of the image.
    """

    rows: np.ndarray
    boxes: np.ndarray
    image: np.ndarray
    category: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, annotations: CocoAnnotations) -> "Objects | None":
        """Those of a data set; None if it has none."""
        rows = np.flatnonzero(~annotations.crowd)
        if not len(rows):
            return None
        return cls(
            rows,
            annotations.boxes[rows],
            annotations.image_index[rows],
            annotations.category_index[rows],
            annotations.sizes()[rows],
        )


def find_suspicious_boxes(annotations: CocoAnnotations, objects: Objects) -> list[str]:
    """What makes boxes look as if they were exported in another form than COCO's."""
    # One of these is the cause, and the others would follow from it.
    checks = (_fractions, _other_layout, _outside, _upper_left)
    first = next(filter(None, (check(annotations, objects) for check in checks)), None)
    return [sentence for sentence in (first, _whole_images(annotations, objects)) if sentence]


def _fractions(annotations: CocoAnnotations, objects: Objects) -> str | None:
    # Such a box would be a single pixel in the corner of its image.
    small = (objects.boxes <= 1).all(axis=1) & (objects.sizes.min(axis=1) > 8)
    if small.mean() < 0.05:
        return None
    return (
        f"{share(small, 'lie')} within 0 to 1, as fractions of the image do: "
        f"{example(annotations, objects, small)}. Boxes are read in pixels: multiply x and width "
        "by the width of the image, y and height by its height"
    )


def _other_layout(annotations: CocoAnnotations, objects: Objects) -> str | None:
    """Boxes that are not x, y, width, height, but would all fit as something else."""
    beyond = ~_inside(_from_box(objects.boxes), objects.sizes, 0.05)
    if beyond.mean() < 0.05:
        return None
    fits = {
        layout: _inside(corners(objects.boxes), objects.sizes, 0.01).mean()
        for layout, corners in _LAYOUTS.items()
        if len(beyond) >= _ENOUGH_BOXES or layout == next(iter(_LAYOUTS))
    }
    best = max(fits, key=fits.__getitem__)
    if fits[best] < 0.99:
        return None
    return (
        f"boxes look like {best}, but are read as x, y, width, height: {share(beyond, 'reach')} "
        f"far beyond their image, as {example(annotations, objects, beyond)}, while read "
        f"as {best} {'all' if fits[best] == 1 else f'{fits[best]:.1%}'} lie inside. Convert them"
    )


def _outside(annotations: CocoAnnotations, objects: Objects) -> str | None:
    corners = _from_box(objects.boxes)
    width, height = (
        np.clip(corners[:, 2 + i], 0, objects.sizes[:, i])
        - np.clip(corners[:, i], 0, objects.sizes[:, i])
        for i in (0, 1)
    )
    outside = width * height < 0.5 * objects.boxes[:, 2] * objects.boxes[:, 3]
    if outside.mean() < 0.05:
        return None
    return (
        f"{share(outside, 'have')} more than half of their area outside their image: "
        f"{example(annotations, objects, outside)}. Boxes are read as x, y, width, height in "
        "pixels of the image file: check that they are, and that images were not resized or "
        "cropped after they were annotated"
    )


def _upper_left(annotations: CocoAnnotations, objects: Objects) -> str | None:
    if len(objects.rows) < 2 * _ENOUGH_BOXES or len(set(objects.image[:1000].tolist())) < 5:
        return None
    reach = (_from_box(objects.boxes)[:, 2:] / objects.sizes).max(axis=0)
    if (reach > 0.5).any():
        return None
    return (
        f"no box reaches beyond {reach[0]:.0%} of the width and {reach[1]:.0%} of the height of "
        f"its image, as {example(annotations, objects, np.ones(1, dtype=bool))}. If they were "
        "annotated on smaller copies, or are percentages, scale them to the pixels of the files"
    )


def _whole_images(annotations: CocoAnnotations, objects: Objects) -> str | None:
    whole = objects.boxes[:, 2] * objects.boxes[:, 3] >= 0.95 * objects.sizes.prod(axis=1)
    if len(whole) < 5 or whole.mean() < 0.9:
        return None
    return (
        f"{share(whole, 'cover')} their whole image: {example(annotations, objects, whole)}. "
        "Labels of whole images train no detector: the objects need boxes of their own"
    )


def _from_box(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)


def _from_center(boxes: np.ndarray) -> np.ndarray:
    half = boxes[:, 2:] / 2
    return np.concatenate((boxes[:, :2] - half, boxes[:, :2] + half), axis=1)


# The corners x0, y0, x1, y1 of four numbers that mean something else than x, y, width, height.
_LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "corners x0, y0, x1, y1": lambda boxes: boxes,
    "corners y0, x0, y1, x1": lambda boxes: boxes[:, [1, 0, 3, 2]],
    "center x, center y, width, height": _from_center,
    "y, x, height, width": lambda boxes: _from_box(boxes[:, [1, 0, 3, 2]]),
}


def _inside(corners: np.ndarray, sizes: np.ndarray, tolerance: float) -> np.ndarray:
    """(B,) bool, corners (B, 4) are such of a box inside the image, give or take a pixel and
    ``tolerance`` of the image's size."""
    margin = 1 + tolerance * sizes
    low, high = corners[:, :2], corners[:, 2:]
    return np.all((low >= -margin) & (low < high) & (high <= sizes + margin), axis=1)


def share(holds: np.ndarray, verb: str) -> str:
    """``"3 of 10 boxes lie"`` for "lie", of as many boxes as (B,) ``holds`` has values."""
    count = int(np.count_nonzero(holds))
    return f"{count:,} of {counted(len(holds), 'box', 'boxes')} {agreeing(count, verb)}"


def example(annotations: CocoAnnotations, objects: Objects, holds: np.ndarray) -> str:
    """The first box that (B,) ``holds`` is true for, in words."""
    index = int(np.argmax(holds))
    image = annotations.images[objects.image[index]]
    name = list(annotations.categories.values())[objects.category[index]]
    box = ", ".join(f"{value:.6g}" for value in objects.boxes[index])
    return (
        f"[{box}] of class {name!r} in image {image.file_name} of {image.width} x "
        f"{image.height} pixels"
    )
