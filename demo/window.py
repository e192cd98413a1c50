"""The window that drawings are shown in if they are not written."""

import os
import sys

from ddetr_d2.errors import UserError

import cv2
import numpy as np

WINDOW = "Deformable DETR"


def check_windows() -> None:
    """Raise a :class:`UserError` if no window can be opened here."""
    no_display = sys.platform == "linux" and not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    )
    # Asked first: without a display OpenCV's window library ends the whole process.
    if no_display:
        raise UserError("there is no display to show drawings on; give --output PATH.")
    try:
        cv2.namedWindow(WINDOW, cv2.WINDOW_NORMAL)
    except cv2.error as error:
        raise UserError(
            "this OpenCV cannot open windows; give --output PATH, or put opencv-python in the "
            "place of opencv-python-headless."
        ) from error


def show(image: np.ndarray, wait: int) -> bool:
    """Show a picture for ``wait`` ms, 0 until a key is pressed; False when the user wants out."""
    cv2.imshow(WINDOW, image)
    return cv2.waitKey(wait) not in (27, ord("q"))
