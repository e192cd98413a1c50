"""Files that come in, and names for those that go out."""

import glob
import mimetypes
import os
from collections.abc import Iterable, Mapping, Sequence

from ddetr_d2.data.images import image_suffixes, is_image
from ddetr_d2.errors import UserError

import cv2
import numpy as np
from PIL import Image

# What OpenCV writes in colour and without being asked for options.
DRAWING_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
VIDEO_SUFFIXES = (".avi", ".mkv", ".mov", ".mp4")
# So many names of files that are left out are shown.
LISTED = 5
# Files of file managers, which nobody means; those with a dot in front are hidden as well.
_HIDDEN_FILES = ("desktop.ini", "thumbs.db")


def find_images(
    patterns: Sequence[str], recursive: bool = False, output: str | None = None
) -> tuple[dict[str, int], list[str], list[str]]:
    """Expand files, globs and folders.

    Of a folder the images are taken: by their suffix, or by their contents where the suffix is
    missing or unknown.

    Args:
        patterns: files, globs, folders.
        recursive: whether folders in folders are searched as well. Links to folders are not
            followed.
        output: a folder that is not searched: drawings of an earlier run are no input.

    Returns:
        the images, each once, and from which character on a path is the name of its drawing: below
        the folder that was searched; messages on what stands for no image; and a message for each
        folder of which something is left out.
    """
    images: dict[str, int] = {}
    problems, left_out = [], []
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        if os.path.isdir(path):
            found, others, unreadable = _search_folder(path, recursive, output)
            problems += unreadable
            if not found and not unreadable:
                problems.append(
                    f"{pattern}: the folder holds no image{_some('; it holds ', others)}"
                )
            elif others:
                left_out.append(f"{pattern}: {_some('left out as no images: ', others)}")
            images |= dict.fromkeys(found, len(os.path.join(path, "")))
            continue
        if os.path.exists(path):
            found = [path]
        else:
            found = sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p))
            if not found:
                problems.append(f"{pattern}: no such file")
        images |= {path: len(path) - len(os.path.basename(path)) for path in found}
    return images, problems, left_out


def _search_folder(
    top: str, recursive: bool, output: str | None
) -> tuple[list[str], list[str], list[str]]:
    """Paths of the images in a folder, names of what else is there, and messages on folders that
    cannot be read."""
    images, others, problems = [], [], []
    not_searched = os.path.realpath(output) if output else None
    remaining = [top]
    while remaining:
        folder = remaining.pop()
        files, folders = [], []
        try:
            # A million files: what scandir knows of an entry saves asking the disk for each.
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name.lower() in _HIDDEN_FILES:
                        continue
                    if entry.is_dir():
                        if not recursive or entry.is_symlink():
                            others.append(os.path.relpath(entry.path, top) + os.sep)
                        elif os.path.realpath(entry.path) != not_searched:
                            folders.append(entry.path)
                    elif (
                        entry.is_file() or not os.path.exists(entry.path)  # no pipe or the like
                    ) and _is_named_or_is_image(entry.path):
                        files.append(entry.path)
                    else:
                        others.append(os.path.relpath(entry.path, top))
        except OSError as error:
            problems.append(f"{folder}: the folder cannot be read: {error.strerror}")
        images += sorted(files)
        remaining += sorted(folders, reverse=True)
    return images, sorted(others), problems


def _is_named_or_is_image(path: str) -> bool:
    suffix = os.path.splitext(path)[1].lower()
    if suffix in image_suffixes():
        return True
    kind = mimetypes.guess_type("name" + suffix)[0]
    known_as_other = kind is not None and not kind.startswith("image/")
    return not known_as_other and is_image(path)


def _some(start: str, names: Sequence[str]) -> str:
    """``start`` and the first of the names, with the number of all if there are more."""
    if not names:
        return ""
    more = len(names) - LISTED
    return start + ", ".join(names[:LISTED]) + (f" and {more:,} more" if more > 0 else "")


def name_drawings(images: Mapping[str, int], output: str) -> list[str]:
    """Choose a file for each image's drawing and create the folders.

    ``output`` is a file if it looks like an image and there is one input, else a folder. Drawings
    have the names of their images, below the folder that was searched, with .png behind them if
    their own kind is not written; where two would be the same, the later ones get a number.

    Args:
        images: of :func:`find_images`.
        output: file or folder.

    Raises:
        UserError: if a drawing would replace an input, is of a kind that is not written, or the
            folder cannot be made.
    """
    to_file = _is_image_name(output) and not os.path.isdir(output)
    if to_file:
        if len(images) > 1:
            raise UserError(
                f"--output {output} is one file, but there are {len(images)} images; give a folder."
            )
        if not output.lower().endswith(DRAWING_SUFFIXES):
            raise UserError(
                f"--output {output}: drawings are not written in this format; give a folder or a "
                f"name that ends in {', '.join(DRAWING_SUFFIXES)}."
            )
        drawings = [output]
    else:
        drawings, taken = [], {}
        for image, start in images.items():
            stem, suffix = os.path.splitext(image[start:])
            if suffix.lower() not in DRAWING_SUFFIXES:
                stem, suffix = stem + suffix, ".png"
            drawings.append(_unused(os.path.join(output, stem), suffix, taken))
    _check_inputs_stay(images, drawings, output)
    for folder in sorted({os.path.dirname(drawing) for drawing in drawings}):
        _make_folder(folder)
    return drawings


def _is_image_name(path: str) -> bool:
    suffix = os.path.splitext(path)[1].lower()
    return suffix in DRAWING_SUFFIXES or suffix in Image.registered_extensions()


def name_samplings(images: Iterable[str], drawings: Sequence[str], output: str) -> list[str]:
    """Choose a file for each picture of sampling points: NAME_sampling.png beside the drawing.

    Raises:
        UserError: if a picture would replace an input.
    """
    taken = {drawing.lower(): 1 for drawing in drawings}
    stems = [os.path.splitext(drawing)[0] for drawing in drawings]
    samplings = [_unused(f"{stem}_sampling", ".png", taken) for stem in stems]
    _check_inputs_stay(images, samplings, output)
    return samplings


def _unused(stem: str, suffix: str, taken: dict[str, int]) -> str:
    """Take ``stem`` with ``suffix``, with a number between them if that name is taken.

    ``taken`` has the last number that was tried for each name. Names that differ in case only are
    the same file on some systems.
    """
    path = stem + suffix
    name, number = path.lower(), 1
    while path.lower() in taken:
        number = taken[name] = taken[name] + 1
        path = f"{stem}_{number}{suffix}"
    taken[path.lower()] = 1
    return path


def _check_inputs_stay(images: Iterable[str], drawings: Sequence[str], output: str) -> None:
    there = {file: drawing for drawing in drawings if (file := _identity(drawing))}
    replaced = there and next(filter(there.get, map(_identity, images)), None)
    if replaced:
        raise UserError(
            f"--output {output}: the drawing {there[replaced]} would replace the input; "
            "give another folder."
        )


def _identity(path: str) -> tuple[int, int] | None:
    """What tells a file from every other, whatever its names; None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


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
