"""Detections drawn on their image."""

import math

import numpy as np
from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import ColorMode, Visualizer

from .labels import set_label_fonts

# Smaller images are enlarged to this length of the longer side before labels are drawn.
MIN_DRAWING_SIZE = 800  # pixels
MIN_FONT_SIZE = 14  # points; labels of small objects get 0.6 of it


def draw_detections(image: np.ndarray, instances: Instances, metadata: Metadata) -> np.ndarray:
    """Draw detections on an (H, W, 3) RGB image, enlarged to where labels can be read.

    Returns:
        (s * H, s * W, 3) RGB with an integer s >= 1.
    """
    scale = min(10, math.ceil(MIN_DRAWING_SIZE / max(image.shape[:2])))
    # In this mode a class has a colour of its own.
    visualizer = Visualizer(image, metadata, scale, ColorMode.SEGMENTATION)
    # Detectron2's smallest size is too small to read on an object of few pixels.
    visualizer._default_font_size = max(visualizer._default_font_size, MIN_FONT_SIZE / scale)
    drawing = visualizer.draw_instance_predictions(instances)
    set_label_fonts(drawing.ax.texts)
    return drawing.get_image()
