"""Detections on image files."""

import contextlib
import sys
import time
from collections.abc import Sequence

from files import write_image
from sampling import SamplingRequest
from tqdm import tqdm
from window import show

from ddetr_d2 import Detector
from ddetr_d2.data import read_image
from ddetr_d2.errors import UserError
from ddetr_d2.visualization import AttentionRecorder, draw_sampling


def run_on_images(
    detector: Detector,
    images: Sequence[str],
    drawings: Sequence[str] | None,
    threshold: float,
    sampling: SamplingRequest | None = None,
) -> int:
    """Detect on each image; write the drawing, or show it if ``drawings`` is None.

    Args:
        detector: takes arrays as BGR.
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
        recorder = AttentionRecorder(detector.model) if sampling else None
        start = time.perf_counter()
        with recorder or contextlib.nullcontext():
            instances = detector(image)
        seconds = time.perf_counter() - start
        instances = instances[instances.scores >= threshold]
        message = f"{path}: {len(instances)} detections in {seconds:.2f} s"
        pictures = [detector.draw(image, instances, threshold)[:, :, ::-1]]
        files = [] if drawings is None else [drawings[index]]
        if sampling:
            panels = sampling.panels(recorder, instances, detector.metadata)
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
