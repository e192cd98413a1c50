"""Warnings about data sets that can be read, but probably do not say what they are meant to say."""

import os
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ..wording import agreeing, counted, plural
from .annotations import CocoAnnotations
from .suspicious_boxes import Objects, example, find_suspicious_boxes, share

# Below so many boxes or images, what is asked about their distribution comes about by chance.
_ENOUGH_BOXES = 10
_ENOUGH_IMAGES = 10


def find_suspicious(annotations: CocoAnnotations) -> list[str]:
    """What makes a data set look as if it was exported or put together wrongly.

    Returns:
        a sentence or two for each finding, with numbers, an example and the remedy; empty as a
        rule.
    """
    found = [_repeated_files(annotations), _similar_names(annotations)]
    if len(annotations.boxes):
        found.append(_mostly_crowds(annotations))
    objects = Objects.of(annotations)
    if objects:
        found += [
            *find_suspicious_boxes(annotations, objects),
            _repeated_boxes(annotations, objects),
            _unused_classes(annotations),
            _classes_of_one_image(annotations, objects),
            _mostly_empty(annotations),
        ]
    return [sentence for sentence in found if sentence]


def repeated_boxes(annotations: CocoAnnotations) -> np.ndarray:
    """Rows of boxes, no crowds, that repeat another one of the same image and class."""
    rows = np.flatnonzero(~annotations.crowd)
    # Sorting by one number that equal boxes have in common is faster than by all that they have.
    group = annotations.image_index * len(annotations.categories) + annotations.category_index
    x, y, width, height = annotations.boxes.T
    number = (x + 1.3 * y + 1.7 * width + 1.9 * height + 2.3 * group)[rows]
    _, inverse, times = np.unique(number, return_inverse=True, return_counts=True)
    rows = rows[times[inverse] > 1]
    keys = (*annotations.boxes[rows].T, group[rows])
    order = np.lexsort(keys)  # stable: of equal boxes the first one stays the first
    same = np.ones(max(len(rows) - 1, 0), dtype=bool)
    for key in keys:
        same &= key[order][1:] == key[order][:-1]
    return np.sort(rows[order[1:][same]])


def _mostly_crowds(annotations: CocoAnnotations) -> str | None:
    if annotations.crowd.mean() < 0.5:
        return None
    image = annotations.images[annotations.image_index[np.flatnonzero(annotations.crowd)[0]]]
    return (
        f'{share(annotations.crowd, "are marked")} as crowds ("iscrowd": 1), the first in '
        f"image {image.file_name}: they are neither trained on nor asked for. If they are "
        "objects, set DATASETS.CROWDS_ARE_OBJECTS True"
    )


def _repeated_boxes(annotations: CocoAnnotations, objects: Objects) -> str | None:
    rows = repeated_boxes(annotations)
    # Large data sets have a few, which do no harm.
    if len(rows) < max(1, 0.005 * len(objects.rows)):
        return None
    chosen = np.isin(objects.rows, rows)
    return (
        f"{share(chosen, 'repeat')} another one of the same class and image: "
        f"{example(annotations, objects, chosen)}. The detector would learn to find such "
        "objects twice, and each one that it misses lowers the AP: leave the repetitions out"
    )


def _unused_classes(annotations: CocoAnnotations) -> str | None:
    counts = np.bincount(annotations.category_index, minlength=len(annotations.categories))
    if not len(annotations.boxes) or counts.all():
        return None
    names = list(annotations.categories.values())
    names = [names[index] for index in np.flatnonzero(counts == 0)]
    return (
        f"{len(names)} of {counted(len(counts), 'class', 'classes')} "
        f"{agreeing(len(names), 'have no box')}: {_listed(names)}. Nothing can be "
        "learned or measured of them: leave them out of 'categories' if they are not meant"
    )


def _classes_of_one_image(annotations: CocoAnnotations, objects: Objects) -> str | None:
    if len(annotations.images) < _ENOUGH_IMAGES:
        return None
    classes = len(annotations.categories)
    totals = np.bincount(objects.category, minlength=classes)
    pairs, counts = np.unique(objects.image * classes + objects.category, return_counts=True)
    per_image = np.bincount(objects.image)
    usual = np.median(per_image[per_image > 0]) if (per_image > 0).sum() > 1 else 0
    one = (
        (counts >= 0.9 * totals[pairs % classes])
        & (counts >= 3 * usual)
        & (totals[pairs % classes] >= _ENOUGH_BOXES)
    )
    # Where most classes have an image of their own, that is how the data is.
    large = np.count_nonzero(totals >= _ENOUGH_BOXES)
    if not one.any() or len(set(pairs[one] // classes)) > max(1, large / 2):
        return None
    names = list(annotations.categories.values())
    lines = [
        f"{counts[i]:,} of {totals[pairs[i] % classes]:,} boxes of class "
        f"{names[pairs[i] % classes]!r} are in image "
        f"{annotations.images[pairs[i] // classes].file_name}"
        for i in np.flatnonzero(one)
    ]
    return (
        f"{_listed(lines, quoted=False)}; the data set has "
        f"{counted(len(annotations.images), 'image')}. "
        "Check the 'image_id' of these annotations"
    )


def _mostly_empty(annotations: CocoAnnotations) -> str | None:
    boxes = np.bincount(annotations.image_index, minlength=len(annotations.images))
    empty = boxes == 0
    if len(empty) < 5 or empty.mean() <= 0.5:
        return None
    first = annotations.images[np.flatnonzero(empty)[0]].file_name
    return (
        f"{np.count_nonzero(empty):,} of {len(empty):,} images have no box, the first is {first}. "
        "They count as images without objects: if they were not annotated at all, leave them out "
        "of 'images'"
    )


def _repeated_files(annotations: CocoAnnotations) -> str | None:
    paths = [os.path.normpath(image.path) for image in annotations.images]
    times = Counter(paths)
    if len(times) == len(paths):
        return None
    path, count = times.most_common(1)[0]
    ids = [
        image.id for image, other in zip(annotations.images, paths, strict=True) if other == path
    ]
    several = sum(count > 1 for count in times.values())
    return (
        f"{several:,} of {counted(len(times), 'image file')} "
        f"{plural(several, 'stands', 'stand')} under several ids in 'images': "
        f"{os.path.basename(path)} has {_listed(ids)}. Each id has only a part of the objects "
        "for its own: give each file one id, and its annotations that one"
    )


def _similar_names(annotations: CocoAnnotations) -> str | None:
    by_key: dict[str, list[str]] = {}
    for name in annotations.categories.values():
        # Names of one letter are those of characters: 'a' and 'A' are two of them.
        key = _SEPARATORS.sub("", name.casefold()) if len(name) > 1 else name
        by_key.setdefault(key, []).append(name)
    same = [" and ".join(map(repr, names)) for names in by_key.values() if len(names) > 1]
    if not same:
        return None
    return (
        f"classes are called almost the same: {_listed(same, quoted=False)}. They are told apart: "
        "give them one name if they are one class"
    )


_SEPARATORS = re.compile(r"(?<=[^\W\d_])[\s_-]+(?=[^\W\d_])")


def _listed(values: Sequence, quoted: bool = True) -> str:
    words = [repr(value) if quoted else value for value in values[:5]]
    return ", ".join(words) + (f" and {len(values) - 5:,} more" if len(values) > 5 else "")
