"""Folders of images with a label file for each: what YOLO and Pascal VOC have in common."""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ddetr_d2.data.coco.image_files import ImageHeader
from ddetr_d2.data.wording import counted, plural
from ddetr_d2.errors import UserError

import numpy as np
from PIL import Image

SPLIT_OF_FOLDER = {
    **dict.fromkeys(("train", "training", "obj_train_data"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "obj_valid_data"), "val"),
    **dict.fromkeys(("test", "testing", "obj_test_data"), "test"),
}
# The folders that the labels of a folder of images can be in; or they are beside the images.
LABEL_FOLDERS = {
    "images": ("labels", "annotations", "Annotations"),
    "jpegimages": ("Annotations", "labels"),
}


@dataclass
class Split:
    """A set of images. ``folder`` is what the names in the COCO file are relative to."""

    name: str
    folder: Path
    images: list[Path]
    labels: list[Path | None] = field(default_factory=list)


class Objects(NamedTuple):
    """The N objects of an image: (N, 4) boxes as x1, y1, x2, y2 in pixels, and their classes.

    ``width`` and ``height`` are those of the image that was annotated.
    """

    width: int
    height: int
    boxes: np.ndarray
    classes: list[str]
    difficult: list[bool]


# Reads a label file, or None for an image that has none, given the header of the image.
ReadLabel = Callable[[Path | None, ImageHeader], Objects]


def note(message: str) -> None:
    print(f"note: {message}")


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is no text in UTF-8: byte {error.start}. If it has another encoding, such as "
            "Latin-1, save the file as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def list_images(folder: Path) -> list[Path]:
    """The images in ``folder`` and below it, of all kinds that Pillow reads, sorted."""
    readable = {s for s, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if os.path.splitext(name)[1].lower() in readable and not name.startswith(".")
    )


def image_folder(folder: Path) -> Path:
    """The folder of images in ``folder``, or itself. Elsewhere VOC has masks, for example."""
    inner = [path for path in sorted(folder.iterdir()) if path.name.lower() in LABEL_FOLDERS]
    return inner[0] if inner and inner[0].is_dir() else folder


def find_label(image: Path, suffix: str) -> Path | None:
    """The label file of an image: in the folder beside ``images``, or beside the image."""
    parts = image.with_suffix(suffix).parts
    candidates = [Path(*parts)]
    for index in reversed(range(len(parts) - 1)):
        if parts[index].lower() in LABEL_FOLDERS:
            for name in LABEL_FOLDERS[parts[index].lower()]:
                candidates.insert(-1, Path(*parts[:index], name, *parts[index + 1 :]))
            break
    return next((path for path in candidates if path.is_file()), None)


def find_labels(splits: Sequence[Split], suffix: str) -> list[Split]:
    """Fill in ``labels``; returns the splits that have some.

    Raises:
        UserError: the first split has none, or two images have the same one.
    """
    kept = []
    for split in splits:
        split.labels = [find_label(image, suffix) for image in split.images]
        if any(split.labels):
            kept.append(split)
        elif split is splits[0]:
            raise UserError(
                f"{split.folder}: none of the {counted(len(split.images), 'image')} has a label "
                f"file ({suffix}) beside it or in a folder called labels or Annotations"
            )
        else:
            note(f"{split.name} is left out: no image in {split.folder} has a label file")
        owners: dict[Path, Path] = {}
        for image, label in zip(split.images, split.labels, strict=True):
            if label and owners.setdefault(label, image) != image:
                raise UserError(
                    f"{label} belongs to both {owners[label].name} and {image.name}: "
                    "remove or rename one of the images"
                )
    used = {label for split in kept for label in split.labels if label}
    beside = {p for folder in {label.parent for label in used} for p in folder.glob(f"*{suffix}")}
    other = re.compile(r"classes|train|trainval|val|valid|test|readme.*", re.IGNORECASE)
    unused = sorted(path for path in beside - used if not other.fullmatch(path.stem))
    if unused:
        note(
            f"{counted(len(unused), 'label file')} {plural(len(unused), 'is', 'are')} not used, as "
            f"no image of these sets has {plural(len(unused), 'its', 'their')} name; "
            f"the first is {unused[0]}"
        )
    return kept


def splits_by_folder(source: Path) -> list[Split]:
    """The sets that folders called train, val and test make, or else all images as one.

    Raises:
        UserError: two folders look like the same set, or none like the training set.
    """
    for base in (image_folder(source), source):
        found: dict[str, list[Path]] = {}
        for path in sorted(base.iterdir()):
            if path.name.lower() in SPLIT_OF_FOLDER and path.is_dir():
                found.setdefault(SPLIT_OF_FOLDER[path.name.lower()], []).append(path)
        if found:
            break
    else:
        found = {"train": [source]}
    for name, paths in found.items():
        if len(paths) > 1:
            raise UserError(f"{paths[0]} and {paths[1]} both look like the {name} set: rename one")
    if "train" not in found:
        raise UserError(
            f"{source} has a folder called {[*found.values()][0][0].name}, but no train"
        )
    folders = {n: image_folder(found[n][0]) for n in ("train", "val", "test") if n in found}
    return [Split(name, folder, list_images(folder)) for name, folder in folders.items()]


def parse_or_point_at(
    parse: Callable[[list], Any], items: Sequence[tuple[str, Any]], path: Path
) -> Any:
    """``parse`` of all items; a ValueError becomes a UserError with the place of the bad item."""
    try:
        return parse([item for _, item in items])
    except ValueError:
        for place, item in items:
            try:
                parse([item])
            except ValueError as error:
                raise UserError(f"{path}, {place}: {error}") from error
        raise
