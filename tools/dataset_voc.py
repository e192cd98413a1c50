"""Pascal VOC folders: their sets of images and XML files."""

import re
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from ddetr_d2.data.coco.image_files import ImageHeader
from ddetr_d2.errors import UserError

import numpy as np
from dataset_folders import (
    Objects,
    Split,
    image_folder,
    list_images,
    parse_or_point_at,
    read_text,
    splits_by_folder,
)
from defusedxml.ElementTree import parse as parse_xml
from supervision.dataset.formats.pascal_voc import detections_from_xml_obj


def is_voc(source: Path) -> bool:
    """Whether the first XML file found in a folder is one of Pascal VOC."""
    path = next(source.rglob("*.xml"), None)
    if path is None:
        return False
    with open(path, "rb") as file:
        return re.search(rb"<annotation[\s>]", file.read(2000)) is not None


def find_splits(source: Path) -> list[Split]:
    """The sets of ImageSets/Main; without them, those of the folders.

    Raises:
        UserError: a list names an image that does not exist.
    """
    lists = {path.stem: path for path in sorted(source.glob("ImageSets/Main/*.txt"))}
    # cat_train.txt says which images of train.txt have cats.
    lists = {n: p for n, p in lists.items() if n.rpartition("_")[2] not in lists or "_" not in n}
    if not lists:
        return splits_by_folder(source)
    folder = image_folder(source)
    by_name: dict[str, Path] = {}
    for image in list_images(folder):
        name = image.relative_to(folder)
        by_name[name.as_posix()] = by_name[name.with_suffix("").as_posix()] = image
    splits = []
    for name, path in lists.items():
        images = []
        for number, line in enumerate(read_text(path).splitlines(), start=1):
            if line.strip():
                image = by_name.get(line.strip()) or by_name.get(line.split()[0])
                if image is None:
                    raise UserError(f"{path}, line {number}: {folder} has no image {line.strip()}")
                images.append(image)
        if images:
            splits.append(Split(name, folder, images))
    order = ("train", "trainval", "val", "test")
    return sorted(splits, key=lambda s: order.index(s.name) if s.name in order else 9)


def read_label(path: Path | None, header: ImageHeader) -> Objects:
    """The objects of an XML file, pixels counted from 1; None for an image without one.

    Raises:
        UserError: the file or an object in it is not valid.
    """

    def parse(elements: list[Element]) -> Any:
        annotation = Element("annotation")
        annotation.extend(elements)
        detections, _ = detections_from_xml_obj(annotation, [], resolution_wh=(1, 1))
        if not all(name_of(element) for element in elements):
            raise ValueError("the name of the class is empty")
        return detections

    def name_of(element: Element) -> str:
        return element.findtext("name", "").strip()

    if path is None:
        return Objects(*header.upright, np.empty((0, 4)), [], [])
    try:
        root = parse_xml(path).getroot()
    except (SyntaxError, ValueError, LookupError) as error:
        raise UserError(f"{path} is no valid XML: {error}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    if root.tag != "annotation":
        raise UserError(f"{path} is no Pascal VOC file: it begins with <{root.tag}>")
    elements = root.findall("object")
    for element in elements:
        for polygon in element.findall("polygon"):  # would be drawn as a mask
            element.remove(polygon)
    items = [(f"object {n} ({name_of(e)})", e) for n, e in enumerate(elements, start=1)]
    boxes = parse_or_point_at(parse, items, path).xyxy
    flags = [element.findtext("difficult", "0").strip() == "1" for element in elements]
    size = annotated_size(root, header, path)
    return Objects(*size, boxes, [name_of(element) for element in elements], flags)


def annotated_size(root: Element, header: ImageHeader, path: Path) -> tuple[int, int]:
    """Width and height of the image as it was annotated: upright, or as it is stored."""
    stored = (header.width, header.height)
    try:
        given = tuple(int(float(root.findtext(f"size/{k}", "0"))) for k in ("width", "height"))
    except ValueError:
        given = (0, 0)
    if given == stored:
        return stored
    # Many files have 0 x 0, or the width for the height.
    if min(given) > 0 and sorted(given) != sorted(stored):
        raise UserError(
            f"{path} is of an image of {given[0]} x {given[1]} pixels, but the image "
            f"has {stored[0]} x {stored[1]}: correct <size>, or annotate it again"
        )
    return header.upright
