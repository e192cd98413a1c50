"""Boxes that were annotated on the pixels as stored, while the image is shown turned by EXIF."""

from collections.abc import Sequence

import numpy as np

from .image_files import ImageHeader


def annotated_as_stored(
    headers: Sequence[ImageHeader], sizes: Sequence[tuple[float, float] | None]
) -> list[bool]:
    """Which images were annotated as stored, and not upright, told by the annotated sizes.

    Where that does not tell (no size is given, or the two have the same: a square, a turn by 180
    degrees, a reflection), the other images of the data set decide: as stored, if some were
    annotated so and none upright.

    Args:
        headers: of the image files.
        sizes: (width, height) that the annotation file gives, None where it does not.
    """
    stored, unclear = [], []
    upright = False
    for header, size in zip(headers, sizes, strict=True):
        as_stored = size == (header.width, header.height)
        as_upright = size == header.upright
        turned = header.orientation != 1
        stored.append(turned and as_stored and not as_upright)
        unclear.append(turned and (size is None or (as_stored and as_upright)))
        upright |= turned and as_upright and not as_stored
    if any(stored) and not upright:
        return [a or b for a, b in zip(stored, unclear, strict=True)]
    return stored


def turn_boxes(
    boxes: np.ndarray, orientation: np.ndarray, width: np.ndarray, height: np.ndarray
) -> np.ndarray:
    """Boxes (B, 4) as x, y, width, height on stored images, on the upright images.

    Args:
        boxes: in pixels of the images as stored.
        orientation: (B,) EXIF orientation, 1 to 8, of each box's image.
        width: (B,) width of each image as stored.
        height: (B,) its height.
    """
    x, y, w, h = boxes.T
    right, below = width - x - w, height - y - h  # distance to the other two borders
    turned = {
        2: (right, y, w, h),
        3: (right, below, w, h),
        4: (x, below, w, h),
        5: (y, x, h, w),
        6: (below, x, h, w),
        7: (below, right, h, w),
        8: (y, right, h, w),
    }
    result = boxes.copy()
    for code, columns in turned.items():
        chosen = orientation == code
        result[chosen] = np.stack(columns, axis=1)[chosen]
    return result
