"""Boxes, areas and crowd flags out of the values that annotation rows have for them."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
from pycocotools import mask

from .annotations import LeftOut
from .rows import AnnotationRow, short

# Numbers in pycocotools' compressed masks: characters of 5 bits each, of which all but a number's
# last one have a sixth bit set. Where that runs on to the end, pycocotools reads on behind it.
_COMPRESSED = re.compile("([P-o]{0,6}[0-O])*")


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
    for index in np.flatnonzero(np.isnan(boxes).any(axis=1)).tolist():
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
        return float(value)
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
        if not _COMPRESSED.fullmatch(counts):
            return None
        value = {"size": [height, width], "counts": counts.encode()}
    return mask.toBbox(value).tolist()


def read_areas(
    values: Sequence[Any], boxes: np.ndarray, sizes: np.ndarray, changes: Counter[str]
) -> np.ndarray:
    """(B,) areas; width x height of the box (B, 4) where the file has none, or one that is larger
    than the image of ``sizes`` (B, 2): COCO's evaluation would leave such an object out."""
    try:
        areas = np.array(values, dtype=float)
    except (TypeError, ValueError, OverflowError):
        areas = np.empty(0)
    if areas.shape != (len(values),):
        areas = np.array([number(value) for value in values])
    absent = ~((areas > 0) & (areas <= sizes.prod(axis=1)))
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
    if isinstance(value, str) and value.strip().lower() in ("true", "yes"):
        flag = True
    else:
        flag = abs(number(value)) > 0  # NaN is not
    if flag and name == "ignore":
        changes["annotations with 'ignore' set taken as crowds"] += 1
    return flag


def usable(boxes: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Which boxes (B, 4) can be trained on and evaluated in images of ``sizes`` (B, 2), and
    which cannot, by reason; (B,) bool each."""
    # In 32 bits, as the model has them: they can be infinite or empty there only.
    with np.errstate(over="ignore", invalid="ignore"):
        low = boxes[:, :2].astype(np.float32)
        high = (boxes[:, :2] + boxes[:, 2:]).astype(np.float32)
        finite = np.isfinite(boxes).all(axis=1) & np.isfinite(low + high).all(axis=1)
        filled = (low < high).all(axis=1)
        inside = ((low < sizes) & (high > 0)).all(axis=1)
    reasons = {
        "have no four finite numbers": ~finite,
        "are empty": finite & ~filled,
        "lie outside the image": finite & filled & ~inside,
    }
    return finite & filled & inside, reasons


def left_out(
    reasons: dict[str, np.ndarray], rows: Sequence[AnnotationRow], image: Callable[[int], str]
) -> dict[str, LeftOut]:
    """Count the boxes that each reason holds for.

    Args:
        reasons: (B,) bool each.
        rows: the annotations.
        image: from the index of an annotation to its image, in words.
    """
    result = {}
    for reason, holds in reasons.items():
        indices = np.flatnonzero(holds).tolist()
        if indices:
            row = rows[indices[0]]
            words = f"annotation {short(row.id)}, {short(row.bbox)} in image {image(indices[0])}"
            result[reason] = LeftOut(len(indices), words)
    return result
