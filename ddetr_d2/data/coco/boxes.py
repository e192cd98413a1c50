"""Boxes, areas and crowd flags out of the values that annotation rows have for them."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from pycocotools import mask

from .annotations import LeftOut
from .rows import AnnotationRow

_CROWD: dict[Any, bool] = {  # 0.0 and False are found as 0
    None: False, 0: False, "": False, "0": False, "false": False, "no": False,
    1: True, "1": True, "true": True, "yes": True,
}  # fmt: skip


def read_boxes(rows: Sequence[AnnotationRow], changes: Counter[str]) -> np.ndarray:
    """The boxes (B, 4) of annotations as x, y, width, height; NaN where there is none.

    Where ``bbox`` is no four numbers, the box of ``segmentation`` is taken.
    """
    try:
        boxes = np.array([row.bbox for row in rows], dtype=float)
    except (TypeError, ValueError, OverflowError):
        boxes = np.empty(0)
    if boxes.shape != (len(rows), 4):
        boxes = np.array([_four_numbers(row.bbox) for row in rows], dtype=float).reshape(-1, 4)
    for index in np.flatnonzero(np.isnan(boxes).any(axis=1)):
        box = box_of_segmentation(rows[index].segmentation)
        if box is not None:
            boxes[index] = box
            changes["boxes taken from 'segmentation'"] += 1
    return boxes


def _four_numbers(value: Any) -> Sequence[float]:
    if isinstance(value, list) and len(value) == 4:
        return [number(entry) for entry in value]
    return [math.nan] * 4


def number(value: Any) -> float:
    """A number, or a text that says one, as float; NaN for everything else."""
    try:
        return math.nan if value is None or isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def box_of_segmentation(content: msgspec.Raw) -> list[float] | None:
    """The bounding box x, y, width, height of polygons or a run-length encoded mask."""
    try:
        value = json.loads(bytes(content))
        if isinstance(value, dict):
            return _box_of_mask(value)
        polygons = value if isinstance(value[0], list) else [value]
        points = np.concatenate([np.array(p, dtype=float).reshape(-1, 2) for p in polygons])
        low, high = points.min(axis=0), points.max(axis=0)
        return [*low, *(high - low)]
    except (TypeError, ValueError, LookupError, OverflowError, RecursionError):
        return None


def _box_of_mask(value: dict) -> list[float] | None:
    height, width = (int(side) for side in value["size"])
    counts = value["counts"]
    if not (0 < height < 2**16 and 0 < width < 2**16):
        return None
    if isinstance(counts, list):
        runs = np.array(counts, dtype=np.int64)
        if (runs < 0).any() or runs.sum() > height * width:
            return None
        value = mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    else:
        value = {"size": [height, width], "counts": str(counts).encode()}
    return mask.toBbox(value).tolist()


def read_areas(values: Sequence[Any], boxes: np.ndarray, changes: Counter[str]) -> np.ndarray:
    """(B,) areas; width x height of the box (B, 4) where the file has none."""
    try:
        areas = np.array(values, dtype=float)
    except (TypeError, ValueError, OverflowError):
        areas = np.empty(0)
    if areas.shape != (len(values),):
        areas = np.array([number(value) for value in values])
    absent = ~(np.isfinite(areas) & (areas > 0))
    if absent.any():
        changes["areas taken as width x height of the box"] += int(absent.sum())
    return np.where(absent, boxes[:, 2] * boxes[:, 3], areas)


def read_crowds(rows: Sequence[AnnotationRow], changes: Counter[str]) -> np.ndarray:
    """(B,) bool, whether an annotation is of a crowd; a set ``ignore`` counts as such."""
    return np.array(
        [
            _flag(row.iscrowd, "iscrowd", changes) or _flag(row.ignore, "ignore", changes)
            for row in rows
        ],
        dtype=bool,
    )


def _flag(value: Any, name: str, changes: Counter[str]) -> bool:
    if type(value) is not int and (value is not None or name == "iscrowd"):
        changes[f"values of {name!r} absent or no number, taken as 0 or 1"] += 1
    if isinstance(value, str):
        value = value.strip().lower()
    try:
        flag = _CROWD.get(value)
    except TypeError:
        flag = None
    if flag is None:
        flag = bool(value) if isinstance(value, int | float) and value == value else False
    if flag and name == "ignore":
        changes["annotations with 'ignore' set taken as crowds"] += 1
    return flag


def usable(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Which boxes (B, 4) can be trained on and evaluated in images of ``sizes`` (B, 2), and
    which cannot, by reason; (B,) bool each."""
    x, y, width, height = boxes.T
    finite = np.isfinite(boxes).all(axis=1)
    with np.errstate(invalid="ignore"):
        filled = (width > 0) & (height > 0)
        inside = (x < sizes[:, 0]) & (y < sizes[:, 1]) & (x + width > 0) & (y + height > 0)
    reasons = {
        "are no four finite numbers": ~finite,
        "are empty": finite & ~filled,
        "lie outside their image": finite & filled & ~inside,
    }
    return finite & filled & inside, reasons


def left_out(
    reasons: dict[str, np.ndarray], rows: Sequence[AnnotationRow], images: Sequence[str]
) -> dict[str, LeftOut]:
    """Count the boxes that each reason holds for.

    Args:
        reasons: (B,) bool each.
        rows: the annotations.
        images: of each annotation its image, in words.
    """
    result = {}
    for reason, holds in reasons.items():
        indices = np.flatnonzero(holds)
        if len(indices):
            row = rows[indices[0]]
            words = f"annotation {row.id!r}, {row.bbox!r} in image {images[indices[0]]}"
            result[reason] = LeftOut(len(indices), words)
    return result
