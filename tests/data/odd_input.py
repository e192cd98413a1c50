"""Odd and broken data sets, each with what has to come of it: the kinds are in odd_*.py.

A kind is a function that spoils a small good data set, in the way of the tool or the accident that
its docstring names. It is registered with what is expected:

- by default the data set is accepted, with the boxes of the good one (:data:`BOXES`);
- ``boxes``: accepted, with these;
- ``left_out``: so many boxes of the file are not used;
- ``said``: a pattern that the log has to show;
- ``refused``: a pattern in the error; no data set comes of it.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

# By image file: class and x, y, width, height of each object, in the upright image.
Boxes = dict[str, list[tuple[str, list[float]]]]
BOXES: Boxes = {
    "a.jpg": [("cat", [5, 5, 20, 10]), ("dog", [30, 10, 25, 25])],
    "b.png": [("dog", [0, 0, 30, 50])],
}
SIZES = {"a.jpg": (64, 48), "b.png": (40, 56)}
CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]


@dataclass
class Data:
    """A data set in the making; :meth:`write` writes the annotation file.

    Attributes:
        root: folder of its own.
        content: the annotation file as objects.
        text: what is written in the place of ``content``, unless None.
        image_root: the declared image folder.
        json_file: the declared annotation file.
        test: another data set to test on; by default that of the training.
        options: of the configuration, as on the command line.
    """

    root: Path
    content: dict = field(init=False)
    text: bytes | str | None = None
    test: "Data | None" = None
    options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.image_root = self.images = self.root / "images"
        self.json_file = self.root / "annotations.json"
        self.images.mkdir(parents=True)
        for name, size in SIZES.items():
            self.save(name, size)
        self.content = {
            "images": [
                {"id": id, "file_name": name, "width": size[0], "height": size[1]}
                for id, (name, size) in enumerate(SIZES.items(), start=1)
            ],
            "annotations": [],
            "categories": copy.deepcopy(CATEGORIES),
        }
        for image_id, objects in enumerate(BOXES.values(), start=1):
            for name, box in objects:
                self.add(image_id, 1 if name == "cat" else 2, box)

    def add(self, image_id, category_id, box, **other) -> dict:
        """Add an annotation."""
        annotation = {
            "id": len(self.content["annotations"]) + 1,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        self.content["annotations"].append(annotation | other)
        return self.content["annotations"][-1]

    def save(self, name: str, size=(64, 48), mode: str = "RGB", **options) -> Path:
        """Write an image of random pixels, in the format of its name unless told otherwise."""
        rng = np.random.default_rng(0)
        image = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
        path = self.images / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image.convert(mode).save(path, **options)
        return path

    def each(self, *kinds: str) -> list[dict]:
        """The rows of the lists of these names."""
        return [row for kind in kinds for row in self.content[kind]]

    @property
    def first(self) -> dict:
        """The first annotation."""
        return self.content["annotations"][0]

    def rename(self, file_name: str) -> None:
        """Give the first image another name in the annotation file."""
        self.content["images"][0]["file_name"] = file_name

    def write(self) -> None:
        if self.test is not None:
            self.test.write()
        text = json.dumps(self.content) if self.text is None else self.text
        if not self.json_file.is_symlink() and not self.json_file.is_dir():
            self.json_file.write_bytes(text.encode() if isinstance(text, str) else text)


@dataclass(frozen=True)
class Kind:
    """A kind of odd input and what is expected of it; see the module's docstring."""

    name: str
    make: Callable[[Data], None]
    boxes: Boxes
    test_boxes: Boxes
    left_out: int
    said: str
    refused: str


KINDS: list[Kind] = []


def kind(
    *,
    boxes: Boxes = BOXES,
    test_boxes: Boxes | None = None,
    left_out: int = 0,
    said: str = "",
    refused: str = "",
) -> Callable[[Callable[[Data], None]], Callable[[Data], None]]:
    """Register a function as a kind; ``test_boxes`` are those of a test set of its own."""

    def register(make: Callable[[Data], None]) -> Callable[[Data], None]:
        KINDS.append(Kind(make.__name__, make, boxes, test_boxes or boxes, left_out, said, refused))
        return make

    return register


def without_first(**more: list) -> Boxes:
    """The boxes of the good data set without the first, and more images."""
    return {"a.jpg": BOXES["a.jpg"][1:], "b.png": BOXES["b.png"], **more}
