"""The rows of a COCO instances file, of which the fields that a box detector uses are read."""

import contextlib
import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from detectron2.utils.file_io import PathManager

from ...errors import UserError


@dataclass(frozen=True)
class CocoSource:
    """Where a data set lies: its name, annotation file and image folder.

    ``remedy`` ends the message about a file or folder that does not exist.
    """

    name: str
    json_file: str
    image_root: str
    remedy: str = "correct the path"

    def __str__(self) -> str:
        return f"data set {self.name!r} ({self.json_file})"


# A field that is absent or null is None. Everything else in the file is skipped without being
# turned into objects.
class ImageRow(msgspec.Struct, gc=False):
    id: Any = None
    file_name: Any = None
    width: Any = None
    height: Any = None


class AnnotationRow(msgspec.Struct, gc=False):
    id: Any = None
    image_id: Any = None
    category_id: Any = None
    bbox: Any = None
    area: Any = None
    iscrowd: Any = None
    ignore: Any = None
    # Left as text: it is of interest only where there is no box.
    segmentation: msgspec.Raw = msgspec.Raw()


class CategoryRow(msgspec.Struct, gc=False):
    id: Any = None
    name: Any = None
    supercategory: Any = None


class Rows(msgspec.Struct):
    """The lists of a COCO instances file; ``annotations`` is None where it is absent."""

    images: list[ImageRow]
    categories: list[CategoryRow]
    annotations: list[AnnotationRow] | None = None


_Row = TypeVar("_Row", ImageRow, AnnotationRow, CategoryRow)


def read_rows(source: CocoSource) -> Rows:
    """Read an annotation file: JSON in UTF-8, UTF-16 or UTF-32, with a byte order mark or without.

    Raises:
        UserError: the file is missing, unreadable, no JSON, or no COCO instances file.
    """
    content = _read_bytes(source)
    # What goes wrong here is read again, more slowly, by what knows NaN and where a mistake is.
    with (
        _no_garbage_collection(),
        contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError),
    ):
        return msgspec.json.decode(content, type=Rows)
    return _from_objects(source, _parse(source, content))


def _read_bytes(source: CocoSource) -> bytes:
    if not PathManager.isfile(source.json_file):
        raise UserError(
            f"data set {source.name!r}: annotation file {source.json_file} does not exist; "
            f"{source.remedy}"
        )
    try:
        with PathManager.open(source.json_file, "rb") as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"{source}: the annotation file cannot be read: {error}") from error
    encoding = json.detect_encoding(content[:4])
    if encoding == "utf-8":
        return content
    try:
        return content.decode(encoding).encode()
    except UnicodeDecodeError as error:
        raise _no_text(source, error) from error


def _no_text(source: CocoSource, error: UnicodeDecodeError) -> UserError:
    return UserError(
        f"{source}: the annotation file is no JSON: byte {error.start} is no text in UTF-8. If it "
        "has another encoding, such as Latin-1, save the file as UTF-8"
    )


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Millions of new objects would be looked through again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _parse(source: CocoSource, content: bytes) -> Any:
    if not content.strip():
        raise UserError(f"{source}: the annotation file is empty")
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{source}: the annotation file is no JSON: {error.msg} in line {error.lineno}, "
            f"column {error.colno}"
        ) from error
    except UnicodeDecodeError as error:
        raise _no_text(source, error) from error
    except RecursionError as error:
        raise UserError(
            f"{source}: the annotation file cannot be read: its lists are nested too deeply"
        ) from error
    except ValueError as error:  # a number of 5,000 digits
        raise UserError(f"{source}: the annotation file cannot be read: {error}") from error


def _from_objects(source: CocoSource, content: Any) -> Rows:
    other = _other_format(content)
    if other:
        raise UserError(f"{source}: no COCO instances file, but {other}")
    if not isinstance(content, dict):
        raise UserError(
            f"{source}: no COCO instances file: its top level is a {type(content).__name__}, not "
            "an object with 'images', 'annotations' and 'categories'"
        )
    images = _rows_of(source, content, "images", ImageRow)
    annotations = _rows_of(source, content, "annotations", AnnotationRow)
    categories = _rows_of(source, content, "categories", CategoryRow)
    if images is None or categories is None:
        absent = "images" if images is None else "categories"
        raise UserError(f"{source}: no COCO instances file, it has no {absent!r}")
    return Rows(images, categories, annotations)


def _rows_of(source: CocoSource, content: dict, key: str, kind: type[_Row]) -> list[_Row] | None:
    entries = content.get(key)
    if entries is None:
        return None
    if not isinstance(entries, list):
        raise UserError(f"{source}: no COCO instances file, its {key!r} is no list")
    rows = []
    for number, entry in enumerate(entries, start=1):
        if not isinstance(entry, dict):
            raise UserError(f"{source}: entry {number} of {key!r} is no object: {short(entry)}")
        fields = {name: entry[name] for name in kind.__struct_fields__ if name in entry}
        if "segmentation" in fields:
            fields["segmentation"] = _as_text(fields["segmentation"])
        rows.append(kind(**fields))
    return rows


def _as_text(segmentation: Any) -> msgspec.Raw:
    try:
        return msgspec.Raw(json.dumps(segmentation).encode())
    except RecursionError:  # nested so deeply that it could just be read
        return msgspec.Raw()


def _other_format(content: Any) -> str | None:
    """What a file that people take for a COCO file is, and the remedy."""
    first = content[0] if isinstance(content, list) and content else None
    if isinstance(first, dict):
        if "score" in first and "image_id" in first:
            return "a list of detections (COCO results): name the annotation file"
        if "annotations" in first and ("data" in first or "image" in first):
            return "an export in another format of annotations: export as COCO"
    if isinstance(content, dict):
        if "shapes" in content and "imagePath" in content:
            return "LabelMe's file of one image: convert the folder to COCO (labelme2coco)"
        if "items" in content and "images" not in content:
            return "Datumaro's own format: export as COCO"
        if "_via_img_metadata" in content or any(
            isinstance(value, dict) and "regions" in value for value in content.values()
        ):
            return "a project of the VGG Image Annotator: export its annotations as COCO"
    return None


def shown(name: str) -> str:
    """A name for messages of one line: as it is, or in quotes where it cannot be printed."""
    return name if name.isprintable() else repr(name)


def short(value: object) -> str:
    """``repr(value)``, at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
