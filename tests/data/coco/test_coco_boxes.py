"""Boxes, areas and crowd flags: what can be derived is, what cannot be used is counted."""

from ddetr_d2.data.coco.boxes import read_areas

import numpy as np
import pytest
from pycocotools import mask

NAN, INF = float("nan"), float("inf")


def encoded() -> dict:
    """COCO's compressed mask of x 3 to 8, y 2 to 7 in an image of 60 x 40 pixels."""
    pixels = np.zeros((40, 60), dtype=np.uint8, order="F")
    pixels[2:7, 3:8] = 1
    found = mask.encode(pixels)
    return {"size": found["size"], "counts": found["counts"].decode()}


UNCOMPRESSED = {
    "size": [40, 60],
    "counts": [3 * 40 + 2, 5, 35, 5, 35, 5, 35, 5, 35, 5, 60 * 40 - 3 * 40 - 7 - 4 * 40],
}
SEGMENTATIONS = {
    "polygon": [[3, 2, 8, 2, 8, 7, 3, 7]],
    "two polygons": [[3, 2, 5, 2, 5, 4], [6, 3, 8, 3, 8, 7]],
    "flat polygon, as of the VGG Image Annotator": [3, 2, 8, 2, 8, 7, 3, 7],
    "polygon of texts": [["3", "2", "8", "2", "8", "7"]],
    "compressed mask": encoded(),
    "uncompressed mask": UNCOMPRESSED,
}


@pytest.mark.parametrize("segmentation", SEGMENTATIONS.values(), ids=list(SEGMENTATIONS))
@pytest.mark.parametrize("box", ["absent", None, [], [None] * 4, "", [NAN] * 4])
def test_box_of_segmentation(coco, read, segmentation, box):
    first = coco.content["annotations"][0]
    first["segmentation"] = segmentation
    first.pop("area")
    first["bbox"] = box
    if box == "absent":
        del first["bbox"]
    found = read()
    assert found.boxes[0].tolist() == [3, 2, 5, 5] and found.areas[0] == 25
    assert found.summary() == (
        "boxes taken from 'segmentation': 1; areas taken as width x height of the box: 1"
    )


# Some of these make a reader of masks run past the end of its memory.
GARBAGE = [
    None, 0, 7.5, True, "", "cat", [], [[]], [[[]]], {}, [1], [[1]], [[1, 2, 3]], [["a", "b"]],
    [None], [[None, None]], [[INF, 1, 2, 3]], [{}], {"size": [40, 60]}, {"counts": [1]},
    {"size": [0, 0], "counts": []}, {"size": [40, 60], "counts": []},
    {"size": [40, 60], "counts": ""}, {"size": [40, 60], "counts": [-1, 5]},
    {"size": [40, 60], "counts": [10**9, 10**9]}, {"size": [40, 60], "counts": [2**63, 2**63]},
    {"size": [40, 60], "counts": [10**30]}, {"size": [10**30, 1], "counts": "1"},
    {"size": [40, 60], "counts": "oooooooooooooooooooo"}, {"size": [40, 60], "counts": "\x00\xff"},
    {"size": [40, 60], "counts": "P" * 1000}, {"size": [40, 60], "counts": {}},
    {"size": [40, 60], "counts": None}, {"size": [40, 60], "counts": [[1], [2]]},
    {"size": "40", "counts": "1"}, {"size": None, "counts": None}, {"size": [NAN, 1], "counts": []},
]  # fmt: skip


@pytest.mark.parametrize("segmentation", GARBAGE, ids=repr)
def test_segmentation_is_not_looked_at_where_there_is_a_box(coco, read, segmentation):
    for annotation in coco.content["annotations"]:
        annotation.update(segmentation=segmentation, keypoints=segmentation, caption=segmentation)
    found = read()
    assert found.boxes.tolist() == [[5, 5, 20, 10], [30, 10, 25, 25], [0, 0, 30, 50]]
    assert found.summary() == ""


@pytest.mark.parametrize("segmentation", GARBAGE, ids=repr)
def test_neither_box_nor_segmentation(coco, read, segmentation):
    coco.content["annotations"][0].update(segmentation=segmentation, bbox=None)
    found = read()
    assert found.boxes.tolist() == [[30, 10, 25, 25], [0, 0, 30, 50]]
    assert sum(left.count for left in found.left_out.values()) == 1


def test_boxes_of_texts(coco, read):
    first = coco.content["annotations"][0]
    first.update(bbox=["5", "5.5", "2e1", " 10 "], area="200")
    found = read()
    assert found.boxes[0].tolist() == [5, 5.5, 20, 10] and found.areas[0] == 200
    assert found.summary() == ""


LEFT_OUT = {
    "have no four finite numbers": [
        [], None, "5, 5, 20, 10", {"x": 5}, 7, True, [5, 5, 20], [5, 5, 20, 10, 0.9],
        [5, 5, 20, "wide"], [5, 5, 20, None], [NAN, 5, 20, 10], [5, 5, INF, 10],
        [-INF, 5, 20, 10], [[5, 5], [20, 10]], [[5], [5], [20], [10]], [5, 5, 10**400, 10],
        [5, 5, 1e39, 10],
    ],
    "are empty": [
        [5, 5, 0, 10], [5, 5, 20, 0], [5, 5, -3, 10], [5, 5, 20, -3], [0, 0, 0, 0],
        [5, 5, 1e-40, 10], [50, 30, 1e-9, 10],
    ],
    "lie outside the image": [
        [60, 5, 10, 10], [5, 40, 10, 10], [5, -20, 10, 20], [-10, 5, 10, 10], [1e30, 5, 1e30, 1e30],
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "box"),
    [(reason, box) for reason, boxes in LEFT_OUT.items() for box in boxes],
    ids=repr,
)
@pytest.mark.parametrize("all_of_them", [False, True])
def test_boxes_left_out(coco, read, reason, box, all_of_them):
    for annotation in coco.content["annotations"][: 2 if all_of_them else 1]:
        annotation.update(bbox=box)
    count = 2 if all_of_them else 1
    found = read()
    assert {name: left.count for name, left in found.left_out.items()} == {reason: count}
    assert found.total == 3 and len(found.boxes) == 3 - count
    # Neither in training nor in evaluation:
    assert [len(r["annotations"]) for r in found.records({1: 0, 2: 1})] == [2 - count, 1, 0]
    assert len(found.as_coco()["annotations"]) == 3 - count


def test_box_partly_outside_stays_as_it_is(coco, read):
    boxes = [[-5, -5, 10, 10], [55, 35, 100, 100], [29, 49, 5, 5]]
    for annotation, box in zip(coco.content["annotations"], boxes, strict=True):
        annotation["bbox"] = box
    assert read().boxes.tolist() == boxes


def test_summary(coco, read):
    first = coco.content["annotations"][0]
    boxes = ([5, 5, 0, 10], [70, 5, 10, 10], [5, 5, 0, 9], [1, 2, 3])
    coco.content["annotations"] += [
        first | {"id": number, "bbox": box} for number, box in enumerate(boxes, start=10)
    ]
    coco.content["annotations"].append(first | {"id": 20, "image_id": "x"})
    assert read().summary() == (
        "5 of 8 boxes are left out of training and evaluation: "
        "1 has no four finite numbers, the first: annotation 13, [1, 2, 3] in image a.png of "
        "60 x 40 pixels; "
        "2 are empty, the first: annotation 10, [5, 5, 0, 10] in image a.png of 60 x 40 pixels; "
        "1 lies outside the image, the first: annotation 11, [70, 5, 10, 10] in image a.png of "
        "60 x 40 pixels; "
        "1 is of an image that is not in 'images', the first: annotation 20 of image 'x'"
    )


def test_summary_is_short_and_of_one_line(coco, read):
    name = "a\nb.png"
    (coco.images / "a.png").rename(coco.images / name)
    coco.content["images"][0]["file_name"] = name
    coco.content["annotations"][0].update(id="x" * 1000, bbox=[0] * 1000)
    coco.content["annotations"][1].update(id="x" * 1000, image_id="\n" * 1000)
    summary = read().summary()
    assert "\n" not in summary and r"in image 'a\nb.png'" in summary
    assert len(summary) < 700


@pytest.mark.parametrize("area", ["absent", None, 0, -5, "", "large", NAN, INF, [], {}, [200]])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_area_derived(coco, read, area, all_of_them):
    annotations = coco.content["annotations"]
    for annotation in annotations if all_of_them else annotations[:1]:
        annotation.update(bbox=[5, 5, 4, 6], area=area)
        if area == "absent":
            del annotation["area"]
    found = read()
    assert found.areas.tolist() == ([24, 24, 24] if all_of_them else [24, 625, 1500])
    count = 3 if all_of_them else 1
    assert found.summary() == f"areas taken as width x height of the box: {count}"


def test_area_of_the_file_counts(coco, read):
    for annotation, area in zip(coco.content["annotations"], (7, 8.5, "9"), strict=True):
        annotation["area"] = area
    assert read().areas.tolist() == [7, 8.5, 9]


def test_no_areas_at_all():
    assert read_areas([], np.zeros((0, 4)), np.zeros((0, 2)), {}).shape == (0,)


def test_areas_larger_than_the_image(coco, read):
    """COCO's evaluation leaves objects of more than 1e10 pixels out: the AP would be NaN."""
    coco.content["annotations"][0]["area"] = 1e11
    coco.content["annotations"][1]["area"] = 60 * 40
    coco.content["annotations"][2]["area"] = 30 * 50 + 1
    annotations = read()
    assert annotations.areas.tolist() == [200, 60 * 40, 30 * 50]
    assert annotations.changes["areas taken as width x height of the box"] == 2


@pytest.mark.parametrize(
    ("value", "crowd"),
    [
        (0, False), (False, False), (0.0, False), (None, False), ("absent", False), ("", False),
        ("0", False), ("0.0", False), ("false", False), ("False", False), ("no", False),
        ([], False), ({}, False), (NAN, False), ("unknown", False),
        (1, True), (True, True), (1.0, True), ("1", True), ("1.0", True), ("true", True),
        ("TRUE ", True), ("yes", True), (2, True), ("2", True),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["iscrowd", "ignore"])
def test_crowds(coco, read, key, value, crowd):
    coco.content["annotations"][0][key] = value
    if value == "absent":
        del coco.content["annotations"][0][key]
    found = read()
    assert found.crowd.tolist() == [crowd, False, False]
    assert [a["iscrowd"] for a in found.as_coco()["annotations"]] == [int(crowd), 0, 0]
    summary = found.summary()
    assert ("annotations with 'ignore' set taken as crowds" in summary) == (
        key == "ignore" and crowd
    )
    no_number = f"values of {key!r} absent or no number, taken as 0 or 1: 1"
    given = value not in (None, "absent") or key == "iscrowd"
    assert (no_number in summary) == (given and type(value) is not int)


def test_crowds_are_objects(coco, read):
    for annotation in coco.content["annotations"]:
        annotation["iscrowd"] = 1
    assert read().crowd.tolist() == [True] * 3
    assert read(crowds_are_objects=True).crowd.tolist() == [False] * 3
