"""Checks of a COCO instances file and its image folder, made before any work begins."""

import json
import logging
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.utils.file_io import PathManager

from ..errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CocoSource:
    """Where a data set lies: its name, annotation file and image folder.

    ``remedy`` ends the message about a file or folder that does not exist.
    """

    name: str
    json_file: str
    image_root: str
    remedy: str

    def __str__(self) -> str:
        return f"data set {self.name!r} ({self.json_file})"


def check_coco_file(
    source: CocoSource, *, training: bool, testing: bool, max_objects: int
) -> dict[int, str]:
    """Check that a data set can be trained on and evaluated, as far as its files tell.

    Boxes that cannot be trained on (see :func:`is_usable_box`) are counted in one warning.

    Args:
        source: the files.
        training: the data set is trained on.
        testing: the data set is evaluated on.
        max_objects: the most objects a training image can have.

    Returns:
        the categories' names by their ids, in ascending order of the ids.

    Raises:
        UserError: the annotation file is missing, is no JSON or no COCO instances file or
            contradicts itself; the image folder or an image file is missing; no object is
            annotated; a training image has too many objects.
    """
    content = _read_json(source)
    categories = _check_categories(source, content)
    images = _check_images(source, content)
    if "annotations" in content:
        _check_annotations(source, content, categories, images, training, testing, max_objects)
    elif training:
        raise UserError(f"{source}: no COCO instances file, it has no 'annotations'")
    else:
        # Such as COCO's test-dev: predictions can be written, and evaluated elsewhere.
        logger.warning("%s has no annotations: there will be predictions, but no AP.", source)
    _check_image_files(source, [image["file_name"] for image in images.values()])
    return categories


def is_usable_box(box: Sequence[float], width: float, height: float) -> bool:
    """Whether a box (x, y, width, height) is finite and has an area inside a width x height image.

    All in pixels.
    """
    x, y, w, h = box
    return (
        all(map(math.isfinite, box))
        and w > 0
        and h > 0
        and x < width
        and y < height
        and x + w > 0
        and y + h > 0
    )


def _read_json(source: CocoSource) -> dict:
    if not PathManager.isfile(source.json_file):
        raise UserError(
            f"data set {source.name!r}: annotation file {source.json_file} does not exist; "
            f"{source.remedy}"
        )
    try:
        with PathManager.open(source.json_file, "r", encoding="utf-8") as file:
            content = json.load(file)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{source}: the annotation file is no JSON: {error.msg} in line {error.lineno}, "
            f"column {error.colno}"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source}: the annotation file is no JSON: byte {error.start} is no text"
        ) from error
    except OSError as error:
        raise UserError(f"{source}: the annotation file cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{source}: no COCO instances file: its top level is a {type(content).__name__}, not "
            "an object with 'images', 'annotations' and 'categories'"
        )
    for key in ("images", "categories", "annotations"):
        if key not in content:
            if key != "annotations":
                raise UserError(f"{source}: no COCO instances file, it has no {key!r}")
        elif not isinstance(content[key], list):
            raise UserError(f"{source}: no COCO instances file, its {key!r} is no list")
    return content


def _check_entries(
    source: CocoSource, content: dict, kind: str, required: dict[str, type | tuple[type, ...]]
) -> None:
    """Every entry of ``content[kind]`` is an object with the ``required`` keys, its id unique."""
    ids = set()
    for number, entry in enumerate(content[kind], start=1):
        for key, types in required.items():
            try:
                value = entry[key]
            except (KeyError, TypeError):
                raise UserError(
                    f"{source}: entry {number} of {kind!r} has no {key!r}: {_short(entry)}"
                ) from None
            if not isinstance(value, types) or isinstance(value, bool):
                raise UserError(
                    f"{source}: entry {number} of {kind!r} has {key!r} {_short(value)}, "
                    f"{_TYPE_NAMES[types]} is expected"
                )
        # The popular minival files of COCO 2014 have a few annotations twice.
        if entry["id"] in ids and "minival" not in source.json_file:
            raise UserError(
                f"{source}: the id {entry['id']!r} stands twice in {kind!r}: ids must be unique"
            )
        ids.add(entry["id"])


_NUMBER = (int, float)
_ID = (int, str)
_TYPE_NAMES = {
    int: "a whole number",
    str: "a text",
    list: "a list",
    _NUMBER: "a number",
    _ID: "a number or a text",
}


def _check_categories(source: CocoSource, content: dict) -> dict[int, str]:
    _check_entries(source, content, "categories", {"id": int, "name": str})
    categories = {c["id"]: c["name"] for c in sorted(content["categories"], key=lambda c: c["id"])}
    if not categories:
        raise UserError(f"{source}: 'categories' is empty: there is nothing to detect")
    ids = list(categories)
    if ids[-1] - ids[0] >= len(ids):
        logger.info(
            "Category ids of %s, %d to %d, have gaps: the %d classes are numbered from 0 in the "
            "order of their ids.",
            source,
            ids[0],
            ids[-1],
            len(ids),
        )
    return categories


def _check_images(source: CocoSource, content: dict) -> dict[int | str, dict]:
    required = {"id": _ID, "file_name": str, "width": _NUMBER, "height": _NUMBER}
    _check_entries(source, content, "images", required)
    if not content["images"]:
        raise UserError(f"{source}: 'images' is empty")
    for image in content["images"]:
        if not (image["width"] >= 1 and image["height"] >= 1):
            raise UserError(
                f"{source}: image {image['file_name']} is given as {image['width']} x "
                f"{image['height']} pixels"
            )
    return {image["id"]: image for image in content["images"]}


def _check_annotations(
    source: CocoSource,
    content: dict,
    categories: dict[int, str],
    images: dict[int | str, dict],
    training: bool,
    testing: bool,
    max_objects: int,
) -> None:
    required = {"id": int, "image_id": _ID, "category_id": int, "bbox": list}
    if testing:
        # COCO's evaluation needs them; it would say so only after the last prediction.
        required |= {"area": _NUMBER, "iscrowd": int}
    _check_entries(source, content, "annotations", required)

    annotations = content["annotations"]
    unknown = [a for a in annotations if a["image_id"] not in images]
    if unknown:
        raise UserError(
            f"{source}: {len(unknown)} of {len(annotations)} annotations have an image_id that "
            f"is not in 'images', first {unknown[0]['image_id']!r} of annotation {unknown[0]['id']}"
        )
    objects: Counter = Counter()
    unusable = []
    for annotation in annotations:
        image = images[annotation["image_id"]]
        box = annotation["bbox"]
        if annotation["category_id"] not in categories:
            raise UserError(
                f"{source}: annotation {annotation['id']} has category_id "
                f"{annotation['category_id']}, which is not in 'categories'"
            )
        if len(box) != 4 or not all(isinstance(v, _NUMBER) for v in box):
            raise UserError(
                f"{source}: annotation {annotation['id']} of image {image['file_name']} has bbox "
                f"{_short(box)}: four numbers x, y, width, height are expected"
            )
        if annotation.get("ignore"):
            raise UserError(
                f"{source}: annotation {annotation['id']} has 'ignore' set, which Detectron2 does "
                'not know: give it "iscrowd": 1 instead, or remove it'
            )
        if annotation.get("iscrowd"):
            continue
        if is_usable_box(box, image["width"], image["height"]):
            objects[annotation["image_id"]] += 1
        else:
            unusable.append(annotation)
    if unusable:
        first, image = unusable[0], images[unusable[0]["image_id"]]
        logger.warning(
            "%s: %d of %d boxes are empty, not finite or outside their image and are not trained "
            "on; the first is annotation %s, %s in image %s of %s x %s pixels.",
            source,
            len(unusable),
            len(annotations),
            first["id"],
            first["bbox"],
            image["file_name"],
            image["width"],
            image["height"],
        )
    if not objects:
        purpose = "to train on" if training else "to evaluate on: no AP can be computed"
        raise UserError(f"{source}: no image has a usable box, there is nothing {purpose}")
    crowded, most = objects.most_common(1)[0]
    if training and most > max_objects:
        raise UserError(
            f"{source}: image {images[crowded]['file_name']} has {most} objects, more than the "
            f"{max_objects} object queries: set MODEL.DEFORMABLE_DETR.NUM_QUERIES to {most} or more"
        )


def _check_image_files(source: CocoSource, file_names: list[str]) -> None:
    root = source.image_root
    if not PathManager.isdir(root):
        raise UserError(
            f"data set {source.name!r}: image folder {root} does not exist; {source.remedy}"
        )
    # One listing of each folder: asking for 100,000 files one by one takes minutes on a network
    # file system.
    paths = [os.path.join(root, name) for name in file_names]
    present: dict[str, set[str]] = {}
    for folder in {os.path.dirname(path) for path in paths}:
        present[folder] = set(PathManager.ls(folder)) if PathManager.isdir(folder) else set()
    missing = [
        name
        for name, path in zip(file_names, paths, strict=True)
        if os.path.basename(path) not in present[os.path.dirname(path)]
    ]
    if missing:
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"{source}: {len(missing)} of {len(file_names)} image files are missing from the image "
            f"folder {root}: {names}"
        )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
