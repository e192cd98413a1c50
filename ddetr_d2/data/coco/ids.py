"""Ids and class names: which rows of a COCO file mean the same thing, and which contradict."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ...errors import UserError
from .annotations import Id
from .rows import AnnotationRow, CategoryRow, CocoSource, ImageRow, short, shown

# Longer texts of digits are no numbers that anybody counts with, and Python refuses 4,300 of them.
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,99})")
_SPELT_NUMBER = re.compile(r"0*([0-9]{1,100})(\.0+)?")
REPEATED = "repeated rows of {!r} taken once"


def normal_id(value: Any) -> Id | None:
    """An id as a whole number where it means one (1, 1.0, "1"), else as a text; None if it is
    none."""
    if isinstance(value, str):
        value = value.strip()
        return int(value) if _NUMBER.fullmatch(value) else value or None
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def find_ids(values: Iterable[Any], known: Mapping[Id, int], changes: Counter[str]) -> np.ndarray:
    """(V,) what ``known`` has for each of ``values``, -1 where one is not in it.

    A text that says a number stands for it; that is counted in ``changes``.
    """
    found = []
    texts = 0
    loose: dict[int | None, int] | None = None
    for value in values:
        try:
            index = None if isinstance(value, bool) else known.get(value)  # True would be 1
        except TypeError:  # a list or an object
            index = None
        if index is None:
            key = normal_id(value)
            index = None if key is None else known.get(key)
            if index is None and key is not None:
                # "007" is 7, unless there is something else of that number.
                loose = _by_number(known) if loose is None else loose
                index = loose.get(_spelt_number(key))
            if index is None:
                index = -1
            else:
                texts += 1
        found.append(index)
    if texts:
        changes["ids given as text were taken as numbers"] += texts
    return np.array(found, dtype=np.int64)


def _by_number(known: Mapping[Id, int]) -> dict[int | None, int]:
    """``known`` by the numbers that its ids say, where but one says it."""
    numbers = {id: _spelt_number(id) for id in known}
    times = Counter(numbers.values())
    return {
        number: known[id]
        for id, number in numbers.items()
        if number is not None and times[number] == 1
    }


def _spelt_number(id: Id) -> int | None:
    """The number that an id says in any spelling, such as "007" and "7.0"; None for other texts."""
    if isinstance(id, int):
        return id
    match = _SPELT_NUMBER.fullmatch(id)
    return int(match[1]) if match else None


def unique_images(
    source: CocoSource, rows: Sequence[ImageRow], changes: Counter[str]
) -> dict[Id, ImageRow]:
    """Image rows by their ids; repetitions are counted in ``changes``.

    Raises:
        UserError: a row has no id or file name, or one id stands for two images.
    """
    images: dict[Id, ImageRow] = {}
    for number, row in enumerate(rows, start=1):
        key = normal_id(row.id)
        if key is None:
            raise UserError(f"{source}: {_no_id(number, 'images', row)}")
        if not isinstance(row.file_name, str) or not row.file_name.strip():
            raise UserError(
                f"{source}: entry {number} of 'images' (id {short(row.id)}) has no file name: "
                f"'file_name' is {short(row.file_name)}"
            )
        first = images.setdefault(key, row)
        if first is not row and (first.file_name, first.width, first.height) != (
            row.file_name,
            row.width,
            row.height,
        ):
            raise UserError(
                f"{source}: one id stands for two images: {_image(first)} and {_image(row)}. "
                "Files that were merged have to be numbered anew"
            )
    if len(rows) > len(images):
        changes[REPEATED.format("images")] += len(rows) - len(images)
    return images


def _image(row: ImageRow) -> str:
    return f"{short(row.id)} is {shown(row.file_name)} ({short(row.width)} x {short(row.height)})"


def _no_id(number: int, kind: str, row: ImageRow | CategoryRow) -> str:
    return (
        f"entry {number} of {kind!r} has no id: 'id' is {short(row.id)}, a whole number is expected"
    )


def unique_categories(
    source: CocoSource,
    rows: Sequence[CategoryRow],
    annotations: Sequence[AnnotationRow],
    changes: Counter[str],
) -> tuple[dict[Id, str], dict[Id, Id]]:
    """Class names by category id, ascending, and for every id of the file the one that counts.

    Two ids of one name are one class, unless they have boxes and different supercategories.

    Args:
        source: for messages.
        rows: the categories of the file.
        annotations: tell which categories are used.
        changes: liberties taken are counted here.

    Raises:
        UserError: there is no category, a row has no id, one id stands for two classes, or one
            name for two different classes.
    """
    categories: dict[Id, CategoryRow] = {}
    names: dict[Id, str] = {}
    for number, row in enumerate(rows, start=1):
        key = normal_id(row.id)
        if key is None:
            raise UserError(f"{source}: {_no_id(number, 'categories', row)}")
        name = _class_name(row.name)
        if not name:
            name = f"category {key}"
            changes["categories without a name, called by their ids"] += 1
        if names.setdefault(key, name) != name:
            raise UserError(
                f"{source}: one id stands for two classes: {short(categories[key].id)} "
                f"is {names[key]!r} and {short(row.id)} is {name!r} in 'categories'"
            )
        categories.setdefault(key, row)
    if not names:
        raise UserError(f"{source}: 'categories' is empty: there is nothing to detect")
    if len(rows) > len(names):
        changes[REPEATED.format("categories")] += len(rows) - len(names)
    same = _merge_names(source, names, categories, annotations)
    kept = sorted(set(same.values()), key=lambda id: (isinstance(id, str), id))
    if len(kept) < len(names):
        changes["categories have the name of another one and count as that"] += len(names) - len(
            kept
        )
    return {id: names[id] for id in kept}, same


def _class_name(value: Any) -> str:
    name = " ".join(str(value).split()) if isinstance(value, str | int | float) else ""
    # Half of a surrogate pair ("\\ud83d" in the file) can be neither printed nor written.
    return name.encode(errors="backslashreplace").decode()


def _merge_names(
    source: CocoSource,
    names: dict[Id, str],
    categories: dict[Id, CategoryRow],
    annotations: Sequence[AnnotationRow],
) -> dict[Id, Id]:
    """For each category id the one that its class goes by."""
    by_name: dict[str, list[Id]] = {}
    for id, name in names.items():
        by_name.setdefault(name, []).append(id)
    same = {id: id for id in names}
    if len(by_name) == len(names):
        return same
    used = {normal_id(row.category_id) for row in annotations}
    for name, ids in by_name.items():
        used_ids = [id for id in ids if id in used]
        supers = {categories[id].supercategory for id in used_ids}
        if len({str(value) for value in supers}) > 1:
            both = " and ".join(f"{id!r} of {categories[id].supercategory!r}" for id in used_ids)
            raise UserError(
                f"{source}: two classes are called {name!r}: the categories {both}; give them "
                "different names"
            )
        chosen = (used_ids or ids)[0]
        same |= dict.fromkeys(ids, chosen)
    return same


def unrepeated(rows: Sequence[AnnotationRow], changes: Counter[str]) -> Sequence[AnnotationRow]:
    """Annotation rows without those that repeat another one, id and all.

    One id for two different annotations contradicts nothing, since nothing refers to it.
    """
    ids = [normal_id(row.id) for row in rows]
    times = Counter(ids)
    if len(times) == len(rows):
        return rows
    seen: set[str] = set()
    repeated: set[Id] = set()
    kept = []
    for id, row in zip(ids, rows, strict=True):
        if id is not None and times[id] > 1:
            content = repr((id, row.image_id, row.category_id, row.bbox, row.iscrowd))
            if not row.bbox:  # what is the object then?
                content += repr(bytes(row.segmentation))
            if content in seen:
                continue
            seen.add(content)
            repeated.add(id)
        kept.append(row)
    if len(kept) < len(rows):
        changes[REPEATED.format("annotations")] += len(rows) - len(kept)
    clashes = len(seen) - len(repeated)
    if clashes:
        changes["annotations have the id of another one; they were numbered anew"] += clashes
    return kept
