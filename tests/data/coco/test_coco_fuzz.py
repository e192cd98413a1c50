"""Random annotation files: each is read into a sound normal form, or refused in one line."""

import contextlib
import copy
import io
import json
import math
import os

from ddetr_d2.data.coco import CocoAnnotations, CocoSource, check_objects, read_annotations
from ddetr_d2.errors import UserError

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "400"))
SIZES = {"a.png": (60, 40), "b.png": (30, 50), "c d.png": (20, 20)}
VALID = {
    "images": [
        {"id": id, "file_name": name, "width": width, "height": height}
        for id, (name, (width, height)) in enumerate(SIZES.items())
    ],
    "annotations": [
        {
            "id": id,
            "image_id": image,
            "category_id": category,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
            "segmentation": [[5, 5, 20, 5, 20, 25]],
        }
        for id, (image, category, box) in enumerate(
            [
                (0, 1, [5, 5, 20, 10]),
                (0, 2, [30.5, 10, 25, 25.25]),
                (1, 2, [0, 0, 30, 50]),
                (2, 5, [3, 3, 9, 9]),
            ]
        )
    ],
    "categories": [
        {"id": 1, "name": "cat", "supercategory": "animal"},
        {"id": 2, "name": "dog", "supercategory": "animal"},
        {"id": 5, "name": "car", "supercategory": ""},
    ],
}

numbers = (
    st.integers(-3, 70)
    | st.integers()
    | st.floats()
    | st.sampled_from([0, 1, 2**31, 2**63, 2**64, 10**30, 1e-300, 1e38, 1e39, 1e300, -0.0])
)
texts = st.text(max_size=8) | st.sampled_from(
    ["1", "01", "1.0", "2 ", "-1", "nan", "1e5", "", " ", "a.png", "A.png", "images/a.png",
     "..\\b.png", "c%20d.png", "/x/c d.png", "cat", "Cat", "\n", "\ud800", "\0", "٣", "9" * 5000]
)  # fmt: skip
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    scalars | st.lists(numbers, min_size=4, max_size=4),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(st.sampled_from(["id", "size", "counts", "x"]) | texts, inner, max_size=3)
    ),
    max_leaves=12,
)
KEYS = ["id", "file_name", "width", "height", "image_id", "category_id", "bbox", "area", "iscrowd",
        "ignore", "segmentation", "name", "supercategory"]  # fmt: skip


def mutate(draw, content: dict) -> None:
    """Change one thing of a file in which lists are still lists of objects."""
    kind = draw(st.sampled_from(["annotations"] * 4 + ["images", "categories"]))
    rows = content.get(kind)
    how = draw(
        st.sampled_from(["value", "box", "kind", "delete", "repeat", "copy", "drop"] * 4 + ["top"])
    )
    if how == "top":
        if draw(st.booleans()):
            content[kind] = draw(values)
        else:
            content.pop(kind, None)
        return
    if not isinstance(rows, list) or not rows:
        return
    index = draw(st.integers(0, len(rows) - 1))
    row = rows[index]
    if not isinstance(row, dict):
        return
    if how == "drop":
        del rows[index]
    elif how == "repeat":
        rows.append(copy.deepcopy(row))
    elif how == "copy":  # a row whose id stands for something else too
        other = draw(st.sampled_from(rows))
        if isinstance(other, dict) and "id" in other:
            row["id"] = other["id"]
    elif how == "delete":
        row.pop(draw(st.sampled_from(sorted(row) or [""])), None)
    elif how == "kind" and row:  # the same number in another type
        key = draw(st.sampled_from(sorted(row)))
        value = row[key]
        if isinstance(value, int | float):
            row[key] = draw(st.sampled_from([str(value), f"0{value}", f"{value}.0", [value]]))
        elif isinstance(value, list):
            row[key] = draw(st.sampled_from([str(value), [str(v) for v in value], [value]]))
        else:
            row[key] = [value]
    elif how == "box" and kind == "annotations":
        row["bbox"] = draw(st.lists(numbers, min_size=4, max_size=4))
    elif row:
        row[draw(st.sampled_from(sorted(row)) | st.sampled_from(KEYS))] = draw(values)


@st.composite
def annotation_files(draw) -> bytes:
    content = copy.deepcopy(VALID)
    for _ in range(draw(st.integers(1, 6))):
        mutate(draw, content)
    damage = draw(st.sampled_from(["none"] * 17 + ["other content", "cut", "splice"]))
    text = json.dumps(draw(values) if damage == "other content" else content)
    place = draw(st.integers(0, len(text)))
    if damage == "cut":
        text = text[:place]
    elif damage == "splice":
        text = text[:place] + draw(texts) + text[place + 1 :]
    encoding = draw(st.sampled_from(["utf-8"] * 20 + ["utf-8-sig", "utf-16", "utf-32-be", "cp500"]))
    return text.encode(encoding, "replace")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> CocoSource:
    folder = tmp_path_factory.mktemp("fuzz")
    for name, size in SIZES.items():
        Image.new("RGB", size).save(folder / name)
    return CocoSource("odd", str(folder / "annotations.json"), str(folder))


@settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(content=annotation_files(), crowds=st.booleans(), training=st.booleans())
def test_annotation_files(source, content, crowds, training):
    with open(source.json_file, "wb") as file:
        file.write(content)
    try:
        found = read_annotations(source, crowds_are_objects=crowds)
        check_sound(found)
        check_objects(found, training=training, max_objects=3)
    except UserError as error:
        message = str(error)
        assert message.startswith("data set 'odd' (") and len(message.splitlines()) == 1
        assert message.encode() and len(message) < 2000
        return
    assert math.isclose(perfect_ap(found), 100) or not found.has_annotations


def check_sound(found: CocoAnnotations) -> None:
    """What everything that follows relies on."""
    summary = found.summary()
    assert len(summary.splitlines()) <= 1 and summary.encode() is not None
    count = len(found.boxes)
    assert count + sum(left.count for left in found.left_out.values()) == found.total
    assert found.boxes.shape == (count, 4) and found.boxes.dtype == float
    assert found.crowd.shape == (count,) and found.crowd.dtype == bool
    assert (
        found.areas.shape == (count,) and np.isfinite(found.areas).all() and (found.areas > 0).all()
    )
    for index, of in ((found.image_index, found.images), (found.category_index, found.categories)):
        assert index.shape == (count,) and (0 <= index).all() and (index < len(of)).all()
    with np.errstate(over="raise"):
        corners = np.concatenate((found.boxes[:, :2], found.boxes[:, :2] + found.boxes[:, 2:]), 1)
        corners = corners.astype(np.float32)
    assert np.isfinite(corners).all() and (corners[:, :2] < corners[:, 2:]).all()
    assert (corners[:, :2] < found.sizes()).all() and (corners[:, 2:] > 0).all()
    for image in found.images:
        assert type(image.id) in (int, str)
        assert (image.width, image.height) == SIZES[os.path.basename(image.path)]
        assert os.path.isfile(image.path)
    assert len({image.id for image in found.images}) == len(found.images)
    assert len(set(found.categories.values())) == len(found.categories)
    assert all(
        name and len(name.splitlines()) == 1 and name.encode() for name in found.categories.values()
    )
    records = found.records({id: n for n, id in enumerate(found.categories)})
    assert sum(len(record["annotations"]) for record in records) == count


def perfect_ap(found: CocoAnnotations) -> float:
    """pycocotools' AP in percent where each object is detected exactly."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = json.loads(json.dumps(found.as_coco()))
        # pycocotools sorts ids, which may be numbers and texts.
        for entry in truth.dataset["images"] + truth.dataset["categories"]:
            entry["id"] = str(entry["id"])
        for entry in truth.dataset.get("annotations", []):
            entry |= {key: str(entry[key]) for key in ("image_id", "category_id")}
        truth.createIndex()
        if not found.has_annotations:
            return math.nan
        keys = ("image_id", "category_id", "bbox")
        results = [
            {key: a[key] for key in keys} | {"score": 0.9}
            for a in truth.dataset["annotations"]
            if not a["iscrowd"]
        ]
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, -1]
    return float(precision[precision > -1].mean() * 100)
