#!/usr/bin/env python
"""Draw detections on images, a video or the pictures of a webcam.

::

    python demo/demo.py --config-file configs/deformable_detr.yaml --input photos/ \\
        --output drawings/ --opts MODEL.WEIGHTS model_final.pth

Exit code: 0; 1 if an input could not be read and was skipped; 2 for a mistake in the arguments.
"""

import argparse
import glob
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap
from detectron2.utils.logger import setup_logger
from detectron2.utils.video_visualizer import VideoVisualizer
from detectron2.utils.visualizer import ColorMode, Visualizer
from tqdm import tqdm

from ddetr_d2.checkpoint import DetrCheckpointer, read_class_names
from ddetr_d2.data import build_augmentation, read_image, register_datasets
from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError, exit_on_user_error

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".mkv", ".mov", ".mp4")
WINDOW = "Deformable DETR"

# Smaller images are enlarged to this length of the longer side before labels are drawn.
MIN_DRAWING_SIZE = 800  # pixels
MIN_FONT_SIZE = 14  # points; labels of small objects get 0.6 of it


class Predictor(DefaultPredictor):
    """Detectron2's predictor, with weights that must fit and the test augmentation of training."""

    def __init__(self, cfg: CfgNode):
        self.cfg = cfg.clone()
        self.model = build_model(self.cfg).eval()
        DetrCheckpointer(self.model, strict=True).load(cfg.MODEL.WEIGHTS)
        (self.aug,) = build_augmentation(cfg, is_train=False)
        self.input_format = cfg.INPUT.FORMAT


def get_parser() -> argparse.ArgumentParser:
    """The program's arguments, named as in Detectron2's demo."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--config-file", required=True, metavar="FILE", help="configuration file")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--input", nargs="+", metavar="PATH", help="image files, globs such as 'a/*.jpg', folders"
    )
    source.add_argument("--video-input", metavar="FILE", help="video file")
    source.add_argument("--webcam", action="store_true", help="take pictures from the webcam")
    parser.add_argument(
        "--output",
        metavar="PATH",
        help="folder for the drawings, or a file for a single one; else they are shown in a window",
    )
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="lowest score that is drawn, 0 to 1 (default: 0.5)",
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="changes to the configuration, as in: --opts MODEL.WEIGHTS model_final.pth",
    )
    return parser


def load_model(config_file: str, opts: Sequence[str]) -> tuple[Predictor, Metadata]:
    """Build the detector and what is known of its classes.

    The names come from the checkpoint, else from the configured data sets.

    Raises:
        UserError: if configuration or weights are missing or wrong.
    """
    cfg = setup_cfg(config_file, opts)
    if not cfg.MODEL.WEIGHTS:
        raise UserError("no weights to detect with; give --opts MODEL.WEIGHTS FILE.")
    names = read_class_names(cfg.MODEL.WEIGHTS)
    node = cfg.MODEL.DEFORMABLE_DETR
    if names is not None:
        node.NUM_CLASSES = len(names)
    else:
        names = _data_set_classes(cfg)
        node.NUM_CLASSES = node.NUM_CLASSES or len(names or ())
    cfg.freeze()
    predictor = Predictor(cfg)
    if names is None or len(names) != node.NUM_CLASSES:
        return predictor, Metadata()
    palette = colormap(rgb=True, maximum=255)
    colors = [palette[i % len(palette)].tolist() for i in range(len(names))]
    return predictor, Metadata(thing_classes=names, thing_colors=colors)


def _data_set_classes(cfg: CfgNode) -> list[str] | None:
    """Names of the configured data sets' classes, None if they are not to be had.

    Detectron2 knows those of its own data sets; others are read from their annotation files.
    """
    names = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]
    if not any(name in DatasetCatalog and _classes(name) for name in names):
        if cfg.DATASETS.TEST:
            cfg.DATASETS.TRAIN = ()  # its files need not be here
        try:
            register_datasets(cfg)
        except UserError as error:
            if cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES:
                return None
            raise UserError(
                f"{cfg.MODEL.WEIGHTS} does not name its classes, and neither do the data sets of "
                f"the configuration ({error}); give --opts MODEL.DEFORMABLE_DETR.NUM_CLASSES."
            ) from error
    known = (_classes(name) for name in names if name in DatasetCatalog)
    return next((classes for classes in known if classes), None)


def _classes(dataset: str) -> list[str] | None:
    return MetadataCatalog.get(dataset).get("thing_classes")


def find_images(patterns: Sequence[str]) -> tuple[list[str], list[str]]:
    """Expand files, globs and folders.

    Returns:
        the images, each once, and messages on what stands for no image.
    """
    images: list[str] = []
    problems = []
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        if os.path.isdir(path):
            names = sorted(os.listdir(path))
            found = [os.path.join(path, n) for n in names if n.lower().endswith(IMAGE_SUFFIXES)]
            if not found:
                problems.append(
                    f"{pattern}: the folder holds no image ({', '.join(IMAGE_SUFFIXES)})"
                )
        elif os.path.exists(path):
            found = [path]
        else:
            found = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
            if not found:
                problems.append(f"{pattern}: no such file")
        images.extend(found)
    return list(dict.fromkeys(images)), problems


def name_drawings(images: Sequence[str], output: str) -> list[str]:
    """Choose a file for each image's drawing and create the folder.

    ``output`` is a file if it looks like an image and there is one input, else a folder. Drawings
    have the names of their images; where two would be the same, the later ones get a number.

    Raises:
        UserError: if a drawing would replace an input, or the folder cannot be made.
    """
    to_file = output.lower().endswith(IMAGE_SUFFIXES) and not os.path.isdir(output)
    if to_file:
        if len(images) > 1:
            raise UserError(
                f"--output {output} is one file, but there are {len(images)} images; give a folder."
            )
        drawings = [output]
    else:
        drawings = []
        for image in images:
            stem, suffix = os.path.splitext(os.path.basename(image))
            if suffix.lower() not in IMAGE_SUFFIXES:  # OpenCV cannot write it
                stem, suffix = stem + suffix, ".png"
            drawing, number = os.path.join(output, stem + suffix), 1
            while drawing in drawings:
                number += 1
                drawing = os.path.join(output, f"{stem}_{number}{suffix}")
            drawings.append(drawing)
    inputs = {os.path.realpath(image): image for image in images}
    for drawing in drawings:
        if os.path.realpath(drawing) in inputs:
            raise UserError(
                f"--output {output}: the drawing {drawing} would replace the input; "
                "give another folder."
            )
    _make_folder(os.path.dirname(output) if to_file else output)
    return drawings


def _make_folder(folder: str) -> None:
    try:
        os.makedirs(folder or ".", exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot create {folder}: {error.strerror}.") from error


def detect(predictor: Predictor, image: np.ndarray, threshold: float) -> Instances:
    """Detections on an (H, W, 3) BGR image with at least this score, on the CPU."""
    instances = predictor(image)["instances"].to("cpu")
    return instances[instances.scores >= threshold]


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
            _write_image(drawings[index], drawing)
            message += f" -> {drawings[index]}"
        tqdm.write(message)
        if drawings is None and not _show(drawing, wait=0):
            break
    return unreadable


def _write_image(path: str, image: np.ndarray) -> None:
    try:
        written = cv2.imwrite(path, image)
    except cv2.error:
        written = False
    if not written:
        raise UserError(f"--output: cannot write {path}; check the folder, its rights and space.")


def run_on_video(
    predictor: Predictor,
    metadata: Metadata,
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
    visualizer = VideoVisualizer(metadata)
    writer = None
    try:
        for frame in tqdm(_frames(video), total=number, unit="frame"):
            instances = detect(predictor, frame, threshold)
            drawing = visualizer.draw_instance_predictions(frame[:, :, ::-1], instances)
            drawing = np.ascontiguousarray(drawing.get_image()[:, :, ::-1])
            if output is None:
                if not _show(drawing, wait=1):
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


def name_video(source: str | None, output: str) -> str:
    """File for the drawn video: ``output`` itself, or in the folder ``output``.

    Raises:
        UserError: if it would replace the input, or the folder cannot be made.
    """
    if output.lower().endswith(VIDEO_SUFFIXES) and not os.path.isdir(output):
        path = output
    else:
        stem = os.path.splitext(os.path.basename(source))[0] if source else "webcam"
        path = os.path.join(output, f"{stem}.mp4")
    if source and os.path.realpath(source) == os.path.realpath(path):
        raise UserError(f"--output {output} would replace the input; give another name.")
    _make_folder(os.path.dirname(path))
    return path


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


def _show(image: np.ndarray, wait: int) -> bool:
    """Show a picture for ``wait`` ms, 0 until a key is pressed; False when the user wants out."""
    cv2.imshow(WINDOW, image)
    return cv2.waitKey(wait) not in (27, ord("q"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    args = get_parser().parse_args(argv)
    if not 0 <= args.confidence_threshold <= 1:
        raise UserError(
            f"--confidence-threshold {args.confidence_threshold} is no score; give 0 to 1."
        )
    # Everything that can be wrong with inputs and output is found before the model is loaded.
    if args.output is None:
        check_windows()
    if args.input:
        images, problems = find_images(args.input)
        if not images:
            raise UserError(f"--input: nothing to detect on: {'; '.join(problems)}")
        for problem in problems:
            print(f"skipped: {problem}", file=sys.stderr)
        drawings = None if args.output is None else name_drawings(images, args.output)
    else:
        source = None if args.webcam else os.path.expanduser(args.video_input)
        if source and not os.path.isfile(source):
            raise UserError(f"--video-input {source} does not exist.")
        output = None if args.output is None else name_video(source, args.output)

    setup_logger(name="fvcore")
    setup_logger(name="ddetr_d2")
    predictor, metadata = load_model(args.config_file, args.opts)
    if not args.input:
        run_on_video(predictor, metadata, source or 0, output, args.confidence_threshold)
        return 0
    unreadable = run_on_images(predictor, metadata, images, drawings, args.confidence_threshold)
    if drawings is not None:
        print(f"{len(images) - unreadable} drawings in {os.path.dirname(drawings[0]) or '.'}")
    if unreadable or problems:
        print(f"{unreadable + len(problems)} inputs were skipped, see above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main())
