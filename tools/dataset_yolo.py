"""YOLO folders: their classes, sets of images and label files."""

import contextlib
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ddetr_d2.data.coco.image_files import ImageHeader
from ddetr_d2.errors import UserError

import yaml
from dataset_folders import (
    Objects,
    ReadLabel,
    Split,
    list_images,
    note,
    parse_or_point_at,
    read_text,
    splits_by_folder,
)
from supervision.dataset.formats.yolo import yolo_annotations_to_detections

CLASS_FILES = ("classes.txt", "obj.names", "_darknet.labels")


def is_yolo(source: Path) -> bool:
    """Whether something names the classes of a YOLO folder."""
    return find_description(source) is not None


def open_folder(source: Path) -> tuple[list[Split], list[str], ReadLabel]:
    """The sets of a YOLO folder, its classes, and what reads its label files.

    Args:
        source: the folder, or the YAML file that describes it.

    Raises:
        UserError: something that it needs is missing or contradicts itself.
    """
    path = find_description(source)
    if path is None:
        raise UserError(f"{source} has no data.yaml with 'names', and no classes.txt or obj.names")
    if path.suffix not in (".yaml", ".yml"):
        names = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        names = class_names(names, path)
        return splits_by_folder(source), names, partial(read_label, names=names, pose_values=0)
    content = read_data_yaml(path)
    names = class_names(content.get("names"), path)
    pose_values = 0
    if "kpt_shape" in content:
        try:
            pose_values = math.prod(int(number) for number in content["kpt_shape"])
        except ValueError:
            raise UserError(
                f"{path}: kpt_shape is {content['kpt_shape']}; two numbers are expected"
            ) from None
    read = partial(read_label, names=names, pose_values=pose_values)
    return yaml_splits(path, content), names, read


def find_description(source: Path) -> Path | None:
    """The YAML file, or else the text file, that names the classes of a YOLO folder."""
    if source.is_file():
        return source
    found = [
        path
        for path in sorted((*source.glob("*.yaml"), *source.glob("*.yml")))
        if re.search(r"^names\s*:", read_text(path), re.MULTILINE)
    ]
    found = [path for path in found if path.stem == "data"] or found
    if not found:
        found = [path for name in CLASS_FILES for path in sorted(source.rglob(name))]
        if len({read_text(path).strip() for path in found}) == 1:
            found = found[:1]
    if len(found) > 1:
        raise UserError(
            f"{source} has several lists of classes: {found[0]}, {found[1]}; "
            "remove one, or give a YAML file instead of the folder"
        )
    return found[0] if found else None


def class_names(names: Any, path: Path) -> list[str]:
    """The names of the classes by index. In YAML they are a list, or a mapping from 0, 1, ..."""
    if isinstance(names, dict):
        numbers = [str(number) for number in range(len(names))]
        if set(names) != set(numbers):
            raise UserError(
                f"{path}: 'names' has the keys {', '.join(names)}; they must be the "
                f"numbers from 0 to {len(names) - 1}"
            )
        names = [names[number] for number in numbers]
    if not names or not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise UserError(f"{path} names no classes: give 'names' a list of them")
    name, times = Counter(names).most_common(1)[0]
    if times > 1:
        raise UserError(f"{path} names the class {name!r} {times} times: rename all but one")
    return names


def read_data_yaml(path: Path) -> dict[str, Any]:
    """The entries of a YAML file; every value in it is a text, so that the name ``no`` is one."""
    try:
        content = yaml.load(read_text(path), yaml.BaseLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: entries such as 'train' and 'names' are expected")
    return content


def resolve(value: str, bases: Sequence[Path]) -> Path | None:
    """The file or folder that a path in data.yaml means.

    Roboflow writes ``../train/images`` for ``train/images``, and others the absolute path of the
    machine that the data set was made on: the end of it is looked for.
    """
    value = value.replace("\\", "/")
    parts = [part for part in value.split("/") if part not in ("", ".", "..")]
    ends = [parts[start:] for start in range(1, len(parts) - 1)]
    candidates = [base.joinpath(*parts) for base in bases] + [base / value for base in bases]
    candidates += [base.joinpath(*end) for end in ends for base in bases]
    return next((path for path in candidates if path.exists()), None)


def yaml_splits(path: Path, content: dict[str, Any]) -> list[Split]:
    """The sets that a data.yaml names: folders, or text files with the paths of images."""
    bases = [path.parent / content.get("path", ""), path.parent]
    splits = []
    for name in ("train", "val", "test"):
        key = "valid" if name == "val" and "val" not in content else name
        entry = content.get(key)
        if not entry:
            continue
        folders: list[Path] = []
        images: list[Path] = []
        for value in entry if isinstance(entry, list) else [entry]:
            found = resolve(value, bases)
            if found is None:
                # Roboflow names sets that it has not exported.
                message = f"{path}: {key} is {value}, which is not in {path.parent}"
                if name == "train":
                    raise UserError(message)
                note(f"{message}: left out")
            elif found.is_dir():
                folders.append(found)
                images += list_images(found)
            else:
                listed = images_of_list(found, [*bases, found.parent])
                folders += {image.parent for image in listed}
                images += listed
        if any(folder.is_absolute() for folder in folders):
            folders = [folder.absolute() for folder in folders]
            images = [image.absolute() for image in images]
        if folders:
            folder = Path(os.path.commonpath(folders))
            splits.append(Split(name, folder, list(dict.fromkeys(images))))
    if not splits or splits[0].name != "train":
        raise UserError(f"{path} names no folder of training images: give it the entry 'train'")
    return splits


def images_of_list(path: Path, bases: Sequence[Path]) -> list[Path]:
    images = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if line.strip():
            image = resolve(line.strip(), bases)
            if image is None:
                raise UserError(f"{path}, line {number}: there is no image {line.strip()}")
            images.append(image)
    return images


def _check_fractions(line: str) -> None:
    """Refuse a line in pixels. Boxes that reach a little beyond the image are not meant."""
    numbers = []
    with contextlib.suppress(ValueError):  # what is no number is refused where it is read
        numbers = [float(word) for word in line.split()[1:5]]
    if any(1.5 < abs(number) < math.inf for number in numbers):
        raise ValueError(
            f"{line.strip()!r} looks like pixels: YOLO wants fractions of the image's width and "
            "height, numbers from 0 to 1"
        )


def read_label(
    path: Path | None, header: ImageHeader, names: Sequence[str], pose_values: int
) -> Objects:
    """The objects of a label file.

    Args:
        path: the file.
        header: of the image. Coordinates are fractions of the upright image.
        names: of the classes.
        pose_values: how many values of keypoints follow a box.
    """

    def parse(lines: list[str]) -> Any:
        if pose_values:
            rows = [line.split() for line in lines]
            lines = [" ".join(r[:5] if len(r) == 5 + pose_values else r) for r in rows]
        for line in lines:
            _check_fractions(line)
        detections = yolo_annotations_to_detections(lines, header.upright, with_masks=False)
        for number in detections.class_id:
            if not 0 <= number < len(names):
                raise ValueError(f"class {number}, but the classes are 0 to {len(names) - 1}")
        return detections

    lines = read_text(path).splitlines() if path else []
    items = [(f"line {n}", line) for n, line in enumerate(lines, start=1) if line.strip()]
    detections = parse_or_point_at(parse, items, path)
    classes = [names[number] for number in detections.class_id]
    return Objects(*header.upright, detections.xyxy, classes, [False] * len(classes))
