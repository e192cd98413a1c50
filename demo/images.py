"""Detections on image files."""

import math
import sys
import time
from collections.abc import Sequence

import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, Visualizer
from files import write_image
from predictor import Predictor, detect
from tqdm import tqdm
from window import show

from ddetr_d2.data import read_image
from ddetr_d2.errors import UserError

# Smaller images are enlarged to this length of the longer side before labels are drawn.
MIN_DRAWING_SIZE = 800  # pixels
MIN_FONT_SIZE = 14  # points; labels of small objects get 0.6 of it


def draw(image: np.ndarray, instances: Instances, metadata: Metadata) -> np.ndarray:
    """Draw detections on an (H, W, 3) BGR image, enlarged to where labels can be read.

    Returns:
        (s * H, s * W, 3) BGR with an integer s >= 1.
    """
    scale = min(10, math.ceil(MIN_DRAWING_SIZE / max(image.shape[:2])))
    # In this mode a class has a colour of its own.
    visualizer = Visualizer(image[:, :, ::-1], metadata, scale, ColorMode.SEGMENTATION)
    # Detectron2's smallest size is too small to read on an object of few pixels.
    visualizer._default_font_size = max(visualizer._default_font_size, MIN_FONT_SIZE / scale)
    return visualizer.draw_instance_predictions(instances).get_image()[:, :, ::-1]


def run_on_images(
    predictor: Predictor,
    metadata: Metadata,
    images: Sequence[str],
    drawings: Sequence[str] | None,
    threshold: float,
) -> int:
    """Detect on each image; write the drawing, or show it if ``drawings`` is None.

    Returns:
        the number of images that could not be read.
    """
    unreadable = 0
    for index, path in enumerate(tqdm(images, unit="image", disable=len(images) == 1)):
        try:
            image = read_image(path, format="BGR")
        except UserError as error:
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            unreadable += 1
            continue
        start = time.perf_counter()
        instances = detect(predictor, image, threshold)
        seconds = time.perf_counter() - start
        drawing = draw(image, instances, metadata)
        message = f"{path}: {len(instances)} detections in {seconds:.2f} s"
        if drawings is not None:
            write_image(drawings[index], drawing)
            message += f" -> {drawings[index]}"
        tqdm.write(message)
        if drawings is None and not show(drawing, wait=0):
            break
    return unreadable
