"""Detections on the frames of a video file or a webcam."""

from collections.abc import Iterator

from ddetr_d2 import Detector
from ddetr_d2.errors import UserError
from ddetr_d2.visualization import set_label_fonts

import cv2
import numpy as np
from detectron2.utils.video_visualizer import VideoVisualizer
from tqdm import tqdm
from window import show


def run_on_video(
    detector: Detector,
    source: str | int,
    output: str | None,
    threshold: float,
) -> None:
    """Detect on each frame of a video file or a webcam (by number); write a video, or show it."""
    name = "the webcam" if isinstance(source, int) else f"the video {source}"
    video = cv2.VideoCapture(source)
    if not video.isOpened():
        raise UserError(f"cannot open {name}; check that it exists and is in a known format.")
    number = None if isinstance(source, int) else int(video.get(cv2.CAP_PROP_FRAME_COUNT)) or None
    visualizer = VideoVisualizer(detector.metadata)
    writer = None
    try:
        for frame in tqdm(_frames(video), total=number, unit="frame"):
            instances = detector(frame)
            instances = instances[instances.scores >= threshold]
            drawing = visualizer.draw_instance_predictions(frame[:, :, ::-1], instances)
            set_label_fonts(drawing.ax.texts)
            drawing = np.ascontiguousarray(drawing.get_image()[:, :, ::-1])
            if output is None:
                if not show(drawing, wait=1):
                    break
                continue
            if writer is None:
                rate = video.get(cv2.CAP_PROP_FPS) or 25.0
                writer = _open_writer(output, rate, drawing.shape[1], drawing.shape[0])
            writer.write(drawing)
    finally:
        video.release()
        if writer is not None:
            writer.release()
    if output is not None:
        if writer is None:
            raise UserError(f"{name} has no frame that can be read.")
        print(f"wrote {output}")


def _frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    while True:
        success, frame = video.read()
        if not success:
            return
        yield frame


def _open_writer(path: str, rate: float, width: int, height: int) -> cv2.VideoWriter:
    codec = "MJPG" if path.lower().endswith(".avi") else "mp4v"
    writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*codec), rate, (width, height))
    if not writer.isOpened():
        raise UserError(f"--output: cannot write a video to {path}; try a name that ends in .avi.")
    return writer
