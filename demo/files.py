"""Files that come in, and names for those that go out."""

import glob
import os
from collections.abc import Sequence

import cv2
import numpy as np

from ddetr_d2.errors import UserError

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".mkv", ".mov", ".mp4")


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
        drawings, taken = [], set()
        for image in images:
            stem, suffix = os.path.splitext(os.path.basename(image))
            if suffix.lower() not in IMAGE_SUFFIXES:  # OpenCV cannot write it
                stem, suffix = stem + suffix, ".png"
            drawings.append(_unused(os.path.join(output, stem), suffix, taken))
    _check_inputs_stay(images, drawings, output)
    _make_folder(os.path.dirname(output) if to_file else output)
    return drawings


def name_samplings(images: Sequence[str], drawings: Sequence[str], output: str) -> list[str]:
    """Choose a file for each picture of sampling points: NAME_sampling.png beside the drawing.

    Raises:
        UserError: if a picture would replace an input.
    """
    taken = set(drawings)
    stems = [os.path.splitext(drawing)[0] for drawing in drawings]
    samplings = [_unused(f"{stem}_sampling", ".png", taken) for stem in stems]
    _check_inputs_stay(images, samplings, output)
    return samplings


def _unused(stem: str, suffix: str, taken: set[str]) -> str:
    """Take ``stem`` with ``suffix``, with a number between them if that name is taken."""
    path, number = stem + suffix, 1
    while path in taken:
        number += 1
        path = f"{stem}_{number}{suffix}"
    taken.add(path)
    return path


def _check_inputs_stay(images: Sequence[str], drawings: Sequence[str], output: str) -> None:
    inputs = {os.path.realpath(image) for image in images}
    for drawing in drawings:
        if os.path.realpath(drawing) in inputs:
            raise UserError(
                f"--output {output}: the drawing {drawing} would replace the input; "
                "give another folder."
            )


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


def _make_folder(folder: str) -> None:
    try:
        os.makedirs(folder or ".", exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot create {folder}: {error.strerror}.") from error


def write_image(path: str, image: np.ndarray) -> None:
    """Write an (H, W, 3) BGR image.

    Raises:
        UserError: if that is not possible.
    """
    try:
        written = cv2.imwrite(path, image)
    except cv2.error:
        written = False
    if not written:
        raise UserError(f"--output: cannot write {path}; check the folder, its rights and space.")
