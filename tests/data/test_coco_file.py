"""Bad annotation files and image folders: one clear message each, before any work."""

import logging
import re

import pytest

from ddetr_d2.data.coco_file import CocoSource, check_coco_file, is_usable_box
from ddetr_d2.errors import UserError


def check(coco, training=True, testing=False, max_objects=300):
    source = CocoSource("cells", str(coco.json_file), str(coco.images), "correct the path")
    return check_coco_file(source, training=training, testing=testing, max_objects=max_objects)


def message_of(coco, **options) -> str:
    with pytest.raises(UserError) as caught:
        check(coco, **options)
    message = str(caught.value)
    assert "\n" not in message and "'cells'" in message
    return message


def test_good_file(coco, caplog):
    with caplog.at_level(logging.INFO, logger="ddetr_d2"):
        assert check(coco, testing=True) == {1: "cat", 2: "dog"}
    assert not caplog.records


def test_annotation_file_missing(coco):
    coco.json_file.unlink()
    message = message_of(coco)
    assert f"annotation file {coco.json_file} does not exist; correct the path" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"", "no JSON: Expecting value in line 1, column 1"),
        (b'{"images": [],\n  "annotations": [}', "no JSON: Expecting value in line 2, column 19"),
        (b'{"images": [', "no JSON"),
        (b"\x89PNG\xff\xfe", "no JSON"),
        (b"[]", "its top level is a list"),
        (b"{}", "has no 'images'"),
        (b'{"images": []}', "has no 'categories'"),
        (b'{"images": [], "categories": []}', "'categories' is empty"),
        (b'{"images": {}, "categories": [], "annotations": []}', "its 'images' is no list"),
    ],
)
def test_no_coco_file(coco, text, expected):
    coco.json_file.write_bytes(text)
    assert expected in message_of(coco)


@pytest.mark.parametrize("kind", ["images", "annotations", "categories"])
def test_id_twice(coco, kind):
    coco.content[kind][1]["id"] = 1
    coco.write()
    assert f"the id 1 stands twice in '{kind}'" in message_of(coco)


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("images", "id"),
        ("images", "file_name"),
        ("images", "width"),
        ("images", "height"),
        ("annotations", "id"),
        ("annotations", "image_id"),
        ("annotations", "category_id"),
        ("annotations", "bbox"),
        ("categories", "id"),
        ("categories", "name"),
    ],
)
def test_key_missing_or_of_wrong_type(coco, kind, key):
    coco.content[kind][1][key] = None
    coco.write()
    assert f"entry 2 of '{kind}' has '{key}' None" in message_of(coco)
    del coco.content[kind][1][key]
    coco.write()
    assert f"entry 2 of '{kind}' has no '{key}'" in message_of(coco)


@pytest.mark.parametrize("key", ["area", "iscrowd"])
def test_evaluation_needs_area_and_iscrowd(coco, key):
    del coco.content["annotations"][0][key]
    coco.write()
    check(coco)
    assert f"has no '{key}'" in message_of(coco, training=False, testing=True)


def test_without_annotations(coco, caplog):
    del coco.content["annotations"]
    coco.write()
    assert "has no 'annotations'" in message_of(coco)
    check(coco, training=False, testing=True)
    assert "no AP" in caplog.text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"image_id": 9}, "1 of 3 annotations have an image_id that is not in 'images', first 9"),
        ({"category_id": 9}, "annotation 1 has category_id 9"),
        ({"bbox": [1, 2, 3]}, "bbox [1, 2, 3]: four numbers"),
        ({"bbox": [1, 2, 3, None]}, "four numbers x, y, width, height"),
        ({"ignore": 1}, '"iscrowd": 1'),
    ],
)
def test_bad_annotation(coco, change, expected):
    coco.content["annotations"][0].update(change)
    coco.write()
    assert expected in message_of(coco)


def test_image_without_size(coco):
    coco.content["images"][0]["width"] = 0
    coco.write()
    assert "image a.png is given as 0 x 40 pixels" in message_of(coco)


def test_image_folder_missing(coco):
    coco.images.rename(coco.root / "elsewhere")
    assert f"image folder {coco.images} does not exist; correct the path" in message_of(coco)


def test_image_files_missing(coco):
    (coco.images / "a.png").unlink()
    assert "1 of 3 image files are missing" in message_of(coco)
    coco.content["images"][1]["file_name"] = "no_such_folder/b.png"
    coco.write()
    message = message_of(coco)
    assert "2 of 3 image files are missing" in message
    assert message.endswith(f"{coco.images}: a.png, no_such_folder/b.png")


def test_images_in_subfolders(coco):
    (coco.images / "sub").mkdir()
    (coco.images / "a.png").rename(coco.images / "sub" / "a.png")
    coco.content["images"][0]["file_name"] = "sub/a.png"
    coco.write()
    check(coco)


@pytest.mark.parametrize(
    "box",
    [
        [5, 5, 0, 10],
        [5, 5, -3, 10],
        [60, 5, 10, 10],
        [5, -20, 10, 20],
        [float("nan"), 5, 10, 10],
        [5, 5, float("inf"), 10],
    ],
)
def test_unusable_box_is_counted_once(coco, caplog, box):
    assert not is_usable_box(box, 60, 40)
    coco.content["annotations"][0]["bbox"] = box
    coco.write()
    check(coco)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    message = record.getMessage()
    assert "1 of 3 boxes are empty, not finite or outside" in message
    assert re.search(r"the first is annotation 1, \[.*\] in image a.png of 60 x 40", message)


def test_box_partly_outside_is_usable():
    assert is_usable_box([-5, -5, 10, 10], 60, 40)
    assert is_usable_box([55, 35, 100, 100], 60, 40)


@pytest.mark.parametrize("training", [True, False])
def test_no_box_at_all(coco, training):
    expected = "nothing to train on" if training else "nothing to evaluate on"
    coco.content["annotations"] = []
    coco.write()
    assert expected in message_of(coco, training=training, testing=not training)


def test_only_crowds_are_no_objects(coco):
    for annotation in coco.content["annotations"]:
        annotation["iscrowd"] = 1
    coco.write()
    assert "no image has a usable box" in message_of(coco)


def test_more_objects_than_queries(coco):
    check(coco, max_objects=2)
    message = message_of(coco, max_objects=1)
    assert "image a.png has 2 objects, more than the 1 object queries" in message
    assert "MODEL.DEFORMABLE_DETR.NUM_QUERIES to 2" in message
    check(coco, training=False, testing=True, max_objects=1)


def test_category_ids_with_gaps(coco, caplog):
    coco.content["categories"][0]["id"] = 7
    coco.content["annotations"][0]["category_id"] = 7
    coco.write()
    with caplog.at_level(logging.INFO, logger="ddetr_d2"):
        assert check(coco) == {2: "dog", 7: "cat"}
    assert [r.levelno for r in caplog.records] == [logging.INFO]
    assert "have gaps: the 2 classes are numbered from 0" in caplog.text
