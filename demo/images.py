"""Detections on image files."""

import contextlib
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
from sampling import SamplingRequest
from tqdm import tqdm
from window import show

from ddetr_d2.data import read_image
from ddetr_d2.errors import UserError
from ddetr_d2.visualization import AttentionRecorder, draw_sampling, set_label_fonts

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
    drawing = visualizer.draw_instance_predictions(instances)
    set_label_fonts(drawing.ax.texts)
    return drawing.get_image()[:, :, ::-1]


def run_on_images(
    predictor: Predictor,
    metadata: Metadata,
    images: Sequence[str],
    drawings: Sequence[str] | None,
    threshold: float,
    sampling: SamplingRequest | None = None,
) -> int:
    """Detect on each image; write the drawing, or show it if ``drawings`` is None.

    Args:
        predictor: the detector.
        metadata: names and colours of its classes.
        images: files to detect on.
        drawings: a file for each drawing.
        threshold: lowest score that is drawn.
        sampling: what to draw of where the detector looks, in pictures of their own.

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
        recorder = AttentionRecorder(predictor.model) if sampling else None
        start = time.perf_counter()
        with recorder or contextlib.nullcontext():
            instances = detect(predictor, image, threshold)
        seconds = time.perf_counter() - start
        message = f"{path}: {len(instances)} detections in {seconds:.2f} s"
        pictures = [draw(image, instances, metadata)]
        files = [] if drawings is None else [drawings[index]]
        if sampling:
            panels = sampling.panels(recorder, instances, metadata)
            if panels:
                pictures.append(draw_sampling(image[:, :, ::-1], panels)[:, :, ::-1])
                if sampling.files:
                    files.append(sampling.files[index])
            else:
                message += ", none to show where the detector looks"
        for file, picture in zip(files, pictures, strict=bool(files)):
            write_image(file, picture)
        tqdm.write(f"{message} -> {', '.join(files)}" if files else message)
        if drawings is None and not all(show(picture, wait=0) for picture in pictures):
            break
    return unreadable
