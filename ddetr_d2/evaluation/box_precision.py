"""COCO's precision of boxes, computed by hotcoco where it is installed, else by pycocotools."""

import contextlib
import io
import logging
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


def coco_api() -> tuple[str, type, type]:
    """Name of the library in use, and its classes ``COCO`` and ``COCOeval``.

    hotcoco computes the same numbers as pycocotools, bit for bit, many times as fast, but is not
    built for every platform.
    """
    try:
        import hotcoco
    except ImportError:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        return "pycocotools (hotcoco is faster but not installed)", COCO, COCOeval
    return "hotcoco", hotcoco.COCO, hotcoco.COCOeval


def box_precision(
    ground_truth: dict[str, Any], detections: np.ndarray, max_detections: int
) -> np.ndarray:
    """Interpolated precision, from which every AP of COCO is averaged.

    Args:
        ground_truth: COCO instances of which all ids are whole numbers from 1.
        detections: ``(N, 7)``, N > 0: image id, x, y, width and height of the box in pixels, score,
            category id. Finite numbers.
        max_detections: the most confident detections that count, per image and category.

    Returns:
        ``(10, 101, categories, 4)``: IoU thresholds 0.5, 0.55 to 0.95; recall 0, 0.01 to 1;
        categories by id; objects of all areas, small, medium and large ones. -1 where there is
        nothing to find.
    """
    name, COCO, COCOeval = coco_api()
    logger.info(f"Evaluating {len(detections):,} detections with {name} ...")
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = COCO()
        truth.dataset = ground_truth
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(detections), "bbox")
        # Several limits would be sorted, and 10 be the last of 1, 10 and max_detections = 5.
        evaluation.params.maxDets = [max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][..., 0]
