"""From a COCO instances file and its image folder to the normal form."""

import math
import os
from collections import Counter
from collections.abc import Sequence

import numpy as np
from detectron2.utils.file_io import PathManager

from ...errors import UserError
from ..wording import agreeing, counted
from .annotations import CocoAnnotations, CocoImage, Id, LeftOut
from .boxes import left_out, number, read_areas, read_boxes, read_crowds, usable
from .ids import find_ids, unique_categories, unique_images, unrepeated
from .image_files import ImageHeader, find_image_files, read_headers, similar_files
from .orientation import annotated_as_stored, turn_boxes
from .rows import AnnotationRow, CocoSource, ImageRow, read_rows, short, shown

_NO_IMAGE = "are of an image that is not in 'images'"


def read_annotations(source: CocoSource, crowds_are_objects: bool = False) -> CocoAnnotations:
    """Read a data set once: everything else in this project sees the result, not the file.

    What can be derived is derived (areas, ``iscrowd``, sizes of images, boxes of polygons and
    masks, ids given as text), what contradicts nothing is accepted (repeated rows, file names
    written in another way), boxes that cannot be used are left out; all of it is counted. Boxes
    annotated on images that EXIF data turns are turned with them.

    Args:
        source: the files.
        crowds_are_objects: take annotations with ``iscrowd`` as ordinary objects.

    Raises:
        UserError: a file is missing or cannot be read, or something in it is ambiguous: one id for
            two images or two classes, an unknown category, another size than the image file has.
    """
    rows = read_rows(source)
    changes: Counter[str] = Counter()
    annotations = unrepeated(rows.annotations or [], changes)
    categories, same = unique_categories(source, rows.categories, annotations, changes)
    image_rows = unique_images(source, rows.images, changes)
    if not image_rows:
        raise UserError(f"{source}: 'images' is empty")
    place = {id: index for index, id in enumerate(categories)}
    category_index = find_ids(
        (row.category_id for row in annotations),
        {id: place[kept] for id, kept in same.items()},
        changes,
    )
    _check_categories(source, annotations, category_index, categories)
    image_index = find_ids(
        (row.image_id for row in annotations),
        {id: index for index, id in enumerate(image_rows)},
        changes,
    )
    paths = _paths(source, [row.file_name for row in image_rows.values()], changes)
    headers = _headers(source, paths)
    images, stored = _images(source, image_rows, paths, headers, changes)
    result = CocoAnnotations(
        source,
        categories,
        images,
        image_index,
        category_index,
        boxes=read_boxes(annotations, changes),
        areas=np.empty(0),
        crowd=read_crowds(annotations, changes),
        has_annotations=rows.annotations is not None,
        total=len(annotations),
        changes=changes,
    )
    if any(stored):
        turned = np.array(
            [header.orientation if s else 1 for header, s in zip(headers, stored, strict=True)]
        )
        width, height = np.array([header[:2] for header in headers]).T
        result.boxes = turn_boxes(
            result.boxes, turned[image_index], width[image_index], height[image_index]
        )
    if crowds_are_objects:
        result.crowd[:] = False
    kept = _keep_usable(result, annotations)
    areas = [annotations[i].area for i in kept]
    result.areas = read_areas(areas, result.boxes, result.sizes(), changes)
    return result


def read_class_names(source: CocoSource) -> list[str]:
    """The names of a data set's classes in the order of their ids; no image is looked for.

    Raises:
        UserError: see :func:`read_annotations`.
    """
    rows = read_rows(source)
    return list(
        unique_categories(source, rows.categories, rows.annotations or [], Counter())[0].values()
    )


def check_objects(annotations: CocoAnnotations, *, training: bool, max_objects: int) -> None:
    """Check that there is something to train on or to evaluate.

    Args:
        annotations: the data set.
        training: it is trained on, and not evaluated only.
        max_objects: the most objects a training image can have.

    Raises:
        UserError: no object is annotated, or an image has too many.
    """
    source = annotations.source
    if not annotations.has_annotations:
        if training:
            raise UserError(f"{source}: no COCO instances file, it has no 'annotations'")
        return
    objects = annotations.objects_per_image()
    if not objects.any():
        purpose = "to train on" if training else "to evaluate on: no AP can be computed"
        if annotations.crowd.any():
            raise UserError(
                f"{source}: there is nothing {purpose}: all annotations "
                f'({annotations.crowd.sum()}) are of crowds ("iscrowd": 1), as CVAT and Datumaro '
                "mark masks. If they are objects, set DATASETS.CROWDS_ARE_OBJECTS True"
            )
        reasons = annotations.summary() if annotations.left_out else "it has no annotations"
        raise UserError(
            f"{source}: no image has a usable box, there is nothing {purpose}: {reasons}"
        )
    most = int(objects.max())
    if training and most > max_objects:
        image = annotations.images[int(objects.argmax())]
        raise UserError(
            f"{source}: image {shown(image.file_name)} has {most} objects, more than the "
            f"{counted(max_objects, 'object query', 'object queries')}: "
            f"set MODEL.DEFORMABLE_DETR.NUM_QUERIES to {most} or more"
        )


def _check_categories(
    source: CocoSource,
    rows: Sequence[AnnotationRow],
    indices: np.ndarray,
    categories: dict[Id, str],
) -> None:
    unknown = np.flatnonzero(indices < 0)
    if len(unknown):
        row = rows[unknown[0]]
        known = ", ".join(f"{id!r} {name}" for id, name in list(categories.items())[:10])
        more = ", ..." if len(categories) > 10 else ""
        raise UserError(
            f"{source}: {len(unknown)} of {counted(len(rows), 'annotation')} "
            f"{agreeing(len(unknown), 'have a category_id that is not')} "
            f"in 'categories': the first is {short(row.category_id)} of annotation "
            f"{short(row.id)}; "
            f"'categories' has {known}{more}"
        )


def _paths(source: CocoSource, names: Sequence[str], changes: Counter[str]) -> list[str]:
    root = source.image_root
    if not PathManager.isdir(root):
        raise UserError(
            f"data set {source.name!r}: image folder {root} does not exist; {source.remedy}"
        )
    paths, changed = find_image_files(root, names)
    missing = [name for name, path in zip(names, paths, strict=True) if path is None]
    if missing:
        hints = similar_files(root, missing[:3])
        listed = [f"{shown(name)}{hints.get(name, '')}" for name in missing]
        raise UserError(
            f"{source}: {len(missing)} of {counted(len(names), 'image file')} "
            f"{agreeing(len(missing), 'are missing')} from the image folder "
            f"{root}: {_first(listed)}; {source.remedy}"
        )
    if changed:
        changes["image files were found under a name written in another way"] += changed
    return [path for path in paths if path is not None]


def _headers(source: CocoSource, paths: Sequence[str]) -> list[ImageHeader]:
    """None where the images lie elsewhere than in a folder of this machine."""
    if not os.path.isdir(source.image_root):
        return []
    headers = read_headers(paths, f"{source.name}: image headers")
    unreadable = [
        f"{shown(os.path.relpath(path, source.image_root))} ({header.error})"
        for path, header in zip(paths, headers, strict=True)
        if header.error
    ]
    if unreadable:
        raise UserError(
            f"{source}: {len(unreadable)} of {counted(len(paths), 'image file')} cannot be read: "
            f"{_first(unreadable)}; replace them, or take them out of the annotation file"
        )
    return headers


def _images(
    source: CocoSource,
    rows: dict[Id, ImageRow],
    paths: Sequence[str],
    headers: Sequence[ImageHeader],
    changes: Counter[str],
) -> tuple[list[CocoImage], list[bool]]:
    """The images, and which of them were annotated as stored."""
    sizes = [_size(row) for row in rows.values()]
    if headers:
        stored = annotated_as_stored(headers, sizes)
        wrong = [
            f"{shown(row.file_name)} is given as {size[0]:.10g} x {size[1]:.10g} and has "
            f"{header.upright[0]} x {header.upright[1]} pixels"
            for row, size, header, as_stored in zip(
                rows.values(), sizes, headers, stored, strict=True
            )
            if size and size != header.upright and not as_stored
        ]
        if wrong:
            raise UserError(
                f"{source}: {len(wrong)} of {counted(len(rows), 'image')} "
                f"{agreeing(len(wrong), 'have another size')} than the "
                f"annotation file says: {_first(wrong)}. Annotate the images that are there, or "
                "put those there that were annotated"
            )
        absent = sum(size is None for size in sizes)
        if absent:
            changes["image sizes were read from the image files"] += absent
        if any(stored):
            changes["images were annotated without their EXIF orientation: boxes turned"] += sum(
                stored
            )
        turned = [(h, size) for h, size in zip(headers, sizes, strict=True) if h.orientation != 1]
        told = any(h[:2] != h.upright and size in (h[:2], h.upright) for h, size in turned)
        if turned and not told:
            changes["images turned by EXIF data were taken as annotated upright"] += len(turned)
        known: Sequence[tuple[float, float]] = [header.upright for header in headers]
    else:
        stored = [False] * len(rows)
        unknown = [
            shown(row.file_name)
            for row, size in zip(rows.values(), sizes, strict=True)
            if size is None
        ]
        if unknown:
            raise UserError(
                f"{source}: {len(unknown)} of {counted(len(rows), 'image')} "
                f"{agreeing(len(unknown), 'have no')} 'width' and 'height', "
                f"and cannot be asked for them: {_first(unknown)}"
            )
        known = [size for size in sizes if size is not None]
    return [
        CocoImage(id, row.file_name, path, int(width), int(height))
        for (id, row), path, (width, height) in zip(rows.items(), paths, known, strict=True)
    ], stored


def _size(row: ImageRow) -> tuple[float, float] | None:
    width, height = number(row.width), number(row.height)
    # A size with a fraction agrees with no image file, and is refused with both numbers.
    return (width, height) if 0 < width < math.inf and 0 < height < math.inf else None


def _keep_usable(annotations: CocoAnnotations, rows: Sequence[AnnotationRow]) -> np.ndarray:
    """Leave out the boxes that cannot be used; returns the indices of those that can."""
    images, image_index = annotations.images, annotations.image_index
    known = image_index >= 0
    kept, reasons = usable(annotations.boxes, annotations.sizes())
    kept &= known
    names = _Names(images, image_index)
    reasons = {reason: holds & known for reason, holds in reasons.items()}
    annotations.left_out = left_out(reasons, rows, names)
    orphans = np.flatnonzero(~known)
    if len(orphans):
        row = rows[orphans[0]]
        first = f"annotation {short(row.id)} of image {short(row.image_id)}"
        annotations.left_out[_NO_IMAGE] = LeftOut(len(orphans), first)
    for name in ("image_index", "category_index", "boxes", "crowd"):
        setattr(annotations, name, getattr(annotations, name)[kept])
    return np.flatnonzero(kept)


class _Names:
    """Of each annotation its image, in words, made when it is asked for."""

    def __init__(self, images: Sequence[CocoImage], index: np.ndarray):
        self._images, self._index = images, index

    def __call__(self, position: int) -> str:
        image = self._images[self._index[position]]
        return f"{shown(image.file_name)} of {image.width} x {image.height} pixels"


def _first(words: Sequence[str]) -> str:
    return ", ".join(words[:3]) + (", ..." if len(words) > 3 else "")
