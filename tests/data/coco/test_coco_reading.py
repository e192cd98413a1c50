"""The annotation file as a whole: texts that are JSON and texts that are not, and the result."""

import copy
import json
import logging
import re

from ddetr_d2.data.coco import check_objects, read_annotations
from ddetr_d2.errors import UserError

import numpy as np
import pytest
from detectron2.data.datasets import load_coco_json, register_coco_instances
from pycocotools.coco import COCO


def test_clean_file(coco, read, caplog):
    with caplog.at_level(logging.INFO):
        found = read()
    assert found.categories == {1: "cat", 2: "dog"}
    assert [(i.id, i.file_name, i.path, i.width, i.height) for i in found.images] == [
        (1, "a.png", str(coco.images / "a.png"), 60, 40),
        (2, "b.png", str(coco.images / "b.png"), 30, 50),
        (3, "empty.png", str(coco.images / "empty.png"), 20, 20),
    ]
    assert found.boxes.tolist() == [[5, 5, 20, 10], [30, 10, 25, 25], [0, 0, 30, 50]]
    assert found.areas.tolist() == [200, 625, 1500]
    assert found.crowd.tolist() == [False] * 3
    assert found.sizes().tolist() == [[60, 40], [60, 40], [30, 50]]
    assert found.objects_per_image().tolist() == [2, 1, 0]
    assert found.objects_per_class().tolist() == [1, 2]
    assert found.summary() == "" and not caplog.records


def test_records(coco, read):
    coco.content["annotations"][2]["iscrowd"] = 1
    found = read()
    (first, second, third) = found.records({1: 5, 2: 0})
    assert first == {
        "file_name": str(coco.images / "a.png"),
        "image_id": 1,
        "width": 60,
        "height": 40,
        "annotations": [
            {"bbox": [5, 5, 20, 10], "bbox_mode": 1, "category_id": 5, "iscrowd": 0},
            {"bbox": [30, 10, 25, 25], "bbox_mode": 1, "category_id": 0, "iscrowd": 0},
        ],
    }
    assert [a["iscrowd"] for a in second["annotations"]] == [1] and third["annotations"] == []
    # Boxes of classes that the model does not have:
    assert [len(r["annotations"]) for r in found.records({1: 0})] == [1, 0, 0]


def test_as_coco(coco, read):
    for entry in coco.content["annotations"]:
        entry["id"] += 10
    expected = copy.deepcopy(coco.content)
    expected["info"] = {}
    for number, entry in enumerate(expected["annotations"], start=1):
        entry["id"] = number
    assert read().as_coco() == expected


def test_same_as_pycocotools_and_detectron2(coco, read):
    """Bit for bit, on boxes of many digits, ids out of order and images without a box."""
    rng = np.random.default_rng(7)
    coco.content["images"].reverse()
    coco.content["categories"] = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco.content["images"]}
    coco.content["annotations"] = [
        {
            "id": int(id),
            "image_id": (image := int(rng.integers(1, 3))),
            "category_id": int(rng.choice([3, 7])),
            "bbox": (rng.random(4) * 0.5 * np.tile(sizes[image], 2)).tolist(),
            "area": float(rng.random() * 99),
            "iscrowd": int(rng.random() < 0.2),
            "segmentation": [[1, 1, 5, 1, 5, 5]],
        }
        for id in rng.permutation(50) + 1
    ]
    found = read()
    register_coco_instances("theirs", {}, str(coco.json_file), str(coco.images))
    theirs = {r["image_id"]: r for r in load_coco_json(str(coco.json_file), coco.images, "theirs")}
    ours = found.records({3: 0, 7: 1})
    assert {record["image_id"] for record in ours} == theirs.keys()
    for record in ours:
        expected = theirs[record["image_id"]]
        assert record["file_name"] == expected["file_name"]
        assert (record["width"], record["height"]) == (expected["width"], expected["height"])
        for annotation in expected["annotations"]:
            del annotation["segmentation"]
        assert record["annotations"] == expected["annotations"]

    truth = COCO(str(coco.json_file))
    keys = ("image_id", "category_id", "bbox", "area", "iscrowd")
    assert [[a[key] for key in keys] for a in found.as_coco()["annotations"]] == [
        [a[key] for key in keys] for a in truth.dataset["annotations"]
    ]


def test_other_keys_are_not_looked_at(coco, read):
    coco.content |= {"info": None, "licenses": 5, "type": [], "videos": {"a": [1e300]}}
    coco.content["images"][0] |= {"date_captured": {}, "coco_url": 5, "license": [None]}
    coco.content["annotations"][0] |= {"attributes": {"a": [1]}, "num_keypoints": "x", "score": {}}
    coco.content["categories"][0] |= {"keypoints": 7, "skeleton": "x", "isthing": None}
    assert len(read().boxes) == 3


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_encodings(coco, source, encoding):
    coco.content["categories"][0]["name"] = "猫"
    text = json.dumps(coco.content, ensure_ascii=False)
    coco.json_file.write_bytes(text.encode(encoding))
    found = read_annotations(source)
    assert found.categories == {1: "猫", 2: "dog"} and len(found.boxes) == 3


def test_nan_and_numbers_out_of_range(coco, source):
    """What Python and other programs write beyond JSON, and JSON beyond 64 bits."""
    text = json.dumps(coco.content)
    text = text.replace("[5, 5, 20, 10]", "[5, NaN, 1e999, -Infinity]")
    coco.json_file.write_text(text.replace('"file_name"', '"extra": 1e400, "file_name"'))
    found = read_annotations(source)
    assert found.left_out["have no four finite numbers"].count == 1 and len(found.boxes) == 2


@pytest.mark.parametrize("depth", [500, *range(900, 1000, 5), 1_000, 5_000, 100_000])
@pytest.mark.parametrize("strict", [True, False])
def test_deep_nesting(coco, source, depth, strict):
    nested = "[" * depth + "]" * depth
    text = json.dumps(coco.content)[:-1] + f', "x": {"0" if strict else "NaN"}}}'
    coco.json_file.write_text(text.replace('"area"', f'"segmentation": {nested}, "area"'))
    try:
        assert len(read_annotations(source).boxes) == 3
    except UserError as error:
        assert depth > 900 and str(error).endswith("its lists are nested too deeply")


def test_annotation_file_missing(coco, refusal, source):
    coco.json_file.unlink()
    with pytest.raises(UserError) as caught:
        read_annotations(source)
    assert str(caught.value) == (
        f"data set 'pets': annotation file {coco.json_file} does not exist; correct the path"
    )


def test_image_folder_missing(coco, refusal):
    coco.images.rename(coco.root / "elsewhere")
    assert f"image folder {coco.images} does not exist; correct the path" in refusal()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b'{"images": [],\n  "annotations": [}', "no JSON: Expecting value in line 2, column 19"),
        (b'{"images": [', "no JSON"),
        (b'{"images": [],}', "no JSON: .* in line 1"),
        (b"{'images': []}", "no JSON: .* in line 1"),
        (b'{"images": [] // none\n}', "no JSON: .* in line 1"),
        (b'{"images": []}\n{"images": []}\n', "no JSON: Extra data in line 2"),
        (b"\x89PNG\xff\xfe", "no JSON"),
        (b"\x1f\x8b\x08\x00\x00\x00", "no JSON"),
        (b"\xff\xfe{\x00\x22", "no JSON"),
        (
            b'{"images": [], "x": "caf\xe9"}',
            "no JSON: byte 24 is no text in UTF-8. If .* Latin-1, save the file as UTF-8",
        ),
        (b'{"images": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b"[]", "its top level is a list"),
        (b"5", "its top level is a int"),
        (b"null", "its top level is a NoneType"),
        (b"{}", "it has no 'images'"),
        (b'{"images": [], "annotations": []}', "it has no 'categories'"),
        (b'{"images": null, "categories": [{"id": 1}]}', "it has no 'images'"),
        (b'{"images": {}, "categories": [], "annotations": []}', "its 'images' is no list"),
        (b'{"images": [], "categories": [], "annotations": {}}', "its 'annotations' is no list"),
        (b'{"images": [5], "categories": []}', "entry 1 of 'images' is no object: 5"),
        (b'{"images": [], "categories": ["cat"]}', "entry 1 of 'categories' is no object: 'cat'"),
        (b'{"images": [], "categories": [{"id": 1}]}', "'images' is empty"),
        (b'[{"image_id": 1, "score": 1, "bbox": []}]', "a list of detections"),
        (b'[{"data": {"image": "a.jpg"}, "annotations": []}]', "another format of annotations"),
        (b'[{"image": "a.jpg", "annotations": []}]', "another format of annotations"),
        (b'{"shapes": [], "imagePath": "a.jpg"}', "LabelMe"),
        (b'{"_via_img_metadata": {}}', "VGG Image Annotator"),
        (b'{"a.jpg123": {"filename": "a.jpg", "regions": []}}', "VGG Image Annotator"),
    ],
)
def test_no_coco_file(coco, source, content, expected):
    coco.json_file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_annotations(source)
    message = str(caught.value)
    assert re.search(expected, message), message
    assert message.startswith(f"data set 'pets' ({coco.json_file}): ") and "\n" not in message


def test_without_annotations(coco, read):
    del coco.content["annotations"]
    found = read()
    assert not found.has_annotations and "annotations" not in found.as_coco()
    check_objects(found, training=False, max_objects=1)
    with pytest.raises(UserError, match="it has no 'annotations'"):
        check_objects(found, training=True, max_objects=1)


@pytest.mark.parametrize(
    ("training", "purpose"), [(True, "nothing to train on"), (False, "nothing to evaluate on")]
)
def test_no_object(coco, read, training, purpose):
    def message() -> str:
        with pytest.raises(UserError) as caught:
            check_objects(read(), training=training, max_objects=300)
        assert purpose in str(caught.value) and "'pets'" in str(caught.value)
        return str(caught.value)

    for annotation in coco.content["annotations"]:
        annotation["iscrowd"] = 1
    assert "all annotations (3) are of crowds" in message()
    assert "set DATASETS.CROWDS_ARE_OBJECTS True" in message()
    check_objects(read(crowds_are_objects=True), training=training, max_objects=300)
    for annotation in coco.content["annotations"]:
        annotation["bbox"] = []
    assert "3 of 3 boxes are left out of training and evaluation" in message()
    coco.content["annotations"] = []
    assert "it has no annotations" in message()


def test_more_objects_than_queries(coco, read):
    found = read()
    check_objects(found, training=True, max_objects=2)
    check_objects(found, training=False, max_objects=1)
    with pytest.raises(UserError) as caught:
        check_objects(found, training=True, max_objects=1)
    assert "image a.png has 2 objects, more than the 1 object query: set" in str(caught.value)
    assert "MODEL.DEFORMABLE_DETR.NUM_QUERIES to 2" in str(caught.value)
    coco.content["annotations"][0]["iscrowd"] = 1  # which no query has to find
    check_objects(read(), training=True, max_objects=1)
