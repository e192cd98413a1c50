"""Detections on image files."""

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from ddetr_d2 import Detector
from ddetr_d2.data import read_image
from ddetr_d2.errors import UserError
from ddetr_d2.visualization import AttentionRecorder, draw_sampling

import numpy as np
from detections import DetectionParts
from detectron2.utils import comm
from files import write_image
from sampling import SamplingRequest
from tqdm import tqdm
from window import show

# Seconds between two states of the progress in a log file.
LOG_INTERVAL = 10


@dataclass(frozen=True)
class Outputs:
    """What becomes of the detections.

    Attributes:
        threshold: lowest score of detections that are drawn and saved.
        drawings: a file for the drawing of each image, or None.
        parts: takes the detections, or None.
        window: whether the drawings are shown.
        sampling: what to draw of where the detector looks, in pictures of their own, or None.
    """

    threshold: float
    drawings: Sequence[str] | None = None
    parts: DetectionParts | None = None
    window: bool = False
    sampling: SamplingRequest | None = None


def run_on_images(
    detector: Detector, images: Sequence[str], outputs: Outputs, batch_size: int = 1
) -> int:
    """Detect on each image, or on this process's share of them, and draw, save or show it.

    Images whose detections are saved already are left out.

    Args:
        detector: takes arrays as BGR.
        images: files to detect on.
        outputs: what becomes of the detections.
        batch_size: images that the detector gets at a time; 1 for pictures of where it looks.

    Returns:
        the number of images that could not be read.
    """
    rank, processes = comm.get_rank(), comm.get_world_size()
    share = range(rank, len(images), processes)
    done = outputs.parts.done(images) if outputs.parts else bytearray(len(images))
    remaining = [number for number in share if not done[number]]
    if any(done) and rank == 0:
        print(f"{sum(done):,} of {len(images):,} images were done before", file=sys.stderr)
    unreadable = 0
    with tqdm(
        desc=f"process 1 of {processes}" if processes > 1 else None,
        total=len(share),
        initial=len(share) - len(remaining),
        unit="image",
        disable=len(images) == 1 or rank > 0,
        mininterval=0.1 if sys.stderr.isatty() else LOG_INTERVAL,
    ) as progress:
        for first in range(0, len(remaining), batch_size):
            numbers = remaining[first : first + batch_size]
            read = {number: _read(images[number]) for number in numbers}
            batch = {number: image for number, image in read.items() if image is not None}
            unreadable += len(read) - len(batch)
            if batch and not _run_on_batch(detector, images, batch, outputs):
                break
            progress.update(len(numbers))
    return unreadable


def _read(path: str) -> np.ndarray | None:
    """(H, W, 3) BGR, or None and a message."""
    try:
        return read_image(path, format="BGR")
    except UserError as error:
        tqdm.write(f"skipped: {error}", file=sys.stderr)
        return None


def _run_on_batch(
    detector: Detector, images: Sequence[str], batch: dict[int, np.ndarray], outputs: Outputs
) -> bool:
    """Detect on images (H, W, 3) BGR, given by their numbers; False when the user wants out."""
    recorder = AttentionRecorder(detector.model) if outputs.sampling else None
    start = time.perf_counter()
    with recorder or contextlib.nullcontext():
        results = detector([*batch.values()], batch_size=len(batch))
    seconds = (time.perf_counter() - start) / len(batch)
    for (number, image), instances in zip(batch.items(), results, strict=True):
        instances = instances[instances.scores >= outputs.threshold]
        if outputs.window or outputs.drawings is not None:
            message = f"{images[number]}: {len(instances)} detections in {seconds:.2f} s"
            pictures = [detector.draw(image, instances, outputs.threshold)[:, :, ::-1]]
            files = [] if outputs.drawings is None else [outputs.drawings[number]]
            if outputs.sampling:
                panels = outputs.sampling.panels(recorder, instances, detector.metadata)
                if panels:
                    pictures.append(draw_sampling(image[:, :, ::-1], panels)[:, :, ::-1])
                    if outputs.sampling.files:
                        files.append(outputs.sampling.files[number])
                else:
                    message += ", none to show where the detector looks"
            for file, picture in zip(files, pictures, strict=bool(files)):
                write_image(file, picture)
            tqdm.write(f"{message} -> {', '.join(files)}" if files else message)
            if outputs.window and not all(show(picture, wait=0) for picture in pictures):
                return False
        # After the drawing: an image is done when its detections are saved.
        if outputs.parts:
            outputs.parts.append(images[number], instances)
    return True
