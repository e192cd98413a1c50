"""Ids and class names: what means the same is one thing, what contradicts is refused."""

from ddetr_d2.data.coco import read_class_names
from ddetr_d2.data.coco.ids import normal_id

import pytest


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (7, 7),
        (0, 0),
        (-3, -3),
        (10**30, 10**30),
        (7.0, 7),
        ("7", 7),
        (" 7 ", 7),
        ("0", 0),
        ("-3", -3),
        ("007", "007"),
        ("a7", "a7"),
        ("1" * 5000, "1" * 5000),
        ("", None),
        (" ", None),
        (7.5, None),
        (float("nan"), None),
        (float("inf"), None),
        (None, None),
        (True, None),
        ([7], None),
        ({"$oid": "7"}, None),
    ],
)
def test_normal_id(value, expected):
    found = normal_id(value)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize("kind", [str, float, lambda n: f"00{n}", lambda n: f"{n}.0"])
def test_references_of_another_kind_than_the_ids(coco, read, kind):
    for annotation in coco.content["annotations"]:
        annotation["image_id"] = kind(annotation["image_id"])
        annotation["category_id"] = kind(annotation["category_id"])
    found = read()
    assert found.image_index.tolist() == [0, 0, 1]
    assert found.category_index.tolist() == [0, 1, 1]
    assert not found.left_out
    assert found.summary() == (
        "" if kind is float else "ids given as text were taken as numbers: 6"
    )


def test_ids_of_another_kind_than_the_references(coco, read):
    for entry in (*coco.content["images"], *coco.content["categories"]):
        entry["id"] = str(entry["id"])
    found = read()
    assert [image.id for image in found.images] == [1, 2, 3]
    assert found.categories == {1: "cat", 2: "dog"}
    assert found.image_index.tolist() == [0, 0, 1]


def test_ids_that_are_texts(coco, read):
    names = {1: "a7f3", 2: "a7f4", 3: "007"}
    for image in coco.content["images"]:
        image["id"] = names[image["id"]]
    for annotation in coco.content["annotations"]:
        annotation["image_id"] = names[annotation["image_id"]]
    coco.content["annotations"][2]["image_id"] = 7
    found = read()
    assert [image.id for image in found.images] == ["a7f3", "a7f4", "007"]
    assert found.image_index.tolist() == [0, 0, 2]


def test_a_number_with_zeros_in_front_is_no_other_image(coco, read):
    """Where "07" could be either of two, it is neither."""
    for image, id in zip(coco.content["images"], ("007", "0007", 3), strict=True):
        image["id"] = id
    for annotation, id in zip(coco.content["annotations"], ("007", "0007", "07"), strict=True):
        annotation.update(image_id=id, bbox=[1, 1, 9, 9])
    found = read()
    assert found.image_index.tolist() == [0, 1]
    assert found.left_out["are of an image that is not in 'images'"].count == 1


@pytest.mark.parametrize("value", [True, None, [1], {"$oid": 1}, float("nan"), "", 1.5, "1" * 5000])
def test_references_that_are_no_ids(coco, read, refusal, value):
    coco.content["annotations"][0]["image_id"] = value
    found = read()
    assert found.image_index.tolist() == [0, 1] and found.category_index.tolist() == [1, 1]
    left = found.left_out["are of an image that is not in 'images'"]
    assert left.count == 1 and left.first.startswith("annotation 1 of image ")
    coco.content["annotations"][0]["category_id"] = value
    assert "1 of 3 annotations has a category_id that is not in 'categories'" in refusal()


@pytest.mark.parametrize(
    "ids", [[0, 1, 2], [None, None, None], ["a", "b", "c"], [10**30, 0.5, []], [5, 5, 5]]
)
def test_annotation_ids_do_not_matter(coco, read, ids):
    for annotation, id in zip(coco.content["annotations"], ids, strict=True):
        annotation["id"] = id
    found = read()
    assert found.boxes.tolist() == [[5, 5, 20, 10], [30, 10, 25, 25], [0, 0, 30, 50]]
    assert [a["id"] for a in found.as_coco()["annotations"]] == [1, 2, 3]
    clash = "annotations have the id of another one; they were numbered anew: 2"
    assert found.summary() == (clash if ids == [5, 5, 5] else "")


def test_annotation_ids_absent(coco, read):
    for annotation in coco.content["annotations"]:
        del annotation["id"]
    assert len(read().boxes) == 3


@pytest.mark.parametrize("kind", [int, float, str])
def test_repeated_annotations_count_once(coco, read, kind):
    for annotation in coco.content["annotations"]:
        annotation["id"] = kind(annotation["id"])
    coco.content["annotations"] += coco.content["annotations"][:2]
    found = read()
    assert len(found.boxes) == found.total == 3
    assert found.summary() == "repeated rows of 'annotations' taken once: 2"


@pytest.mark.parametrize("key", ["bbox", "category_id", "image_id"])
def test_annotations_that_differ_are_not_repeated(coco, read, key):
    other = {"bbox": [1, 1, 2, 2], "category_id": 2, "image_id": 2}
    first = coco.content["annotations"][0]
    coco.content["annotations"].append(first | {key: other[key]})
    found = read()
    assert len(found.boxes) == found.total == 4
    assert found.summary() == "annotations have the id of another one; they were numbered anew: 1"


def test_annotations_whose_polygons_differ_are_not_repeated(coco, read):
    for shift, annotation in enumerate(coco.content["annotations"][:2]):
        annotation.update(id=0, category_id=1, segmentation=[[shift, 0, 9, 0, 9, 9]])
        del annotation["bbox"]
    assert read().boxes[:2].tolist() == [[0, 0, 9, 9], [1, 0, 8, 9]]


def test_repeated_rows_of_images_and_categories(coco, read):
    coco.content["images"].append(coco.content["images"][0] | {"license": 3})
    coco.content["categories"] += coco.content["categories"]
    found = read()
    assert [image.id for image in found.images] == [1, 2, 3]
    assert found.categories == {1: "cat", 2: "dog"}
    assert found.summary() == (
        "repeated rows of 'categories' taken once: 2; repeated rows of 'images' taken once: 1"
    )


@pytest.mark.parametrize("id", [1, "1", 1.0])
def test_one_id_for_two_images(coco, refusal, id):
    coco.content["images"][1]["id"] = id
    assert f"one id stands for two images: 1 is a.png (60 x 40) and {id!r} is b.png (30 x 50)" in (
        refusal()
    )


@pytest.mark.parametrize("id", [1, "1"])
def test_one_id_for_two_classes(coco, refusal, id):
    coco.content["categories"][1]["id"] = id
    expected = f"one id stands for two classes: 1 is 'cat' and {id!r} is 'dog'"
    assert expected in refusal()


def test_unknown_category(coco, refusal):
    coco.content["annotations"][1]["category_id"] = 9
    assert (
        "1 of 3 annotations has a category_id that is not in 'categories': the first is 9 of "
        "annotation 2; 'categories' has 1 cat, 2 dog"
    ) in refusal()


@pytest.mark.parametrize("value", [None, "", True, 1.5, [], {}])
@pytest.mark.parametrize("kind", ["images", "categories"])
def test_row_without_an_id(coco, refusal, kind, value):
    coco.content[kind][1]["id"] = value
    assert f"entry 2 of '{kind}' has no id: 'id' is {value!r}" in refusal()


@pytest.mark.parametrize("value", [None, "", "  ", 5, ["a.png"]])
def test_image_without_a_file_name(coco, refusal, value):
    coco.content["images"][1]["file_name"] = value
    assert f"entry 2 of 'images' (id 2) has no file name: 'file_name' is {value!r}" in refusal()


def test_classes_in_the_order_of_their_ids(coco, read, source):
    coco.content["categories"] = [
        {"id": "x", "name": "cow"},
        {"id": 10**30, "name": "owl"},
        {"id": 2, "name": "dog"},
        {"id": 1, "name": "cat"},
    ]
    assert list(read().categories.items()) == [
        (1, "cat"),
        (2, "dog"),
        (10**30, "owl"),
        ("x", "cow"),
    ]
    assert read_class_names(source) == ["cat", "dog", "owl", "cow"]


def test_class_names_in_their_normal_form(coco, read):
    coco.content["categories"] = [
        {"id": 1, "name": "  traffic \t light\n"},
        {"id": 2, "name": 7},
        {"id": 3, "name": None},
        {"id": 4},
        {"id": 5, "name": "\ud800"},
    ]
    found = read()
    assert found.categories == {
        1: "traffic light",
        2: "7",
        3: "category 3",
        4: "category 4",
        5: "\\ud800",
    }
    assert found.summary() == "categories without a name, called by their ids: 2"


def test_class_without_a_name_is_not_taken_for_another_one(coco, read):
    coco.content["categories"] = [{"id": 1}, {"id": 2, "name": "1"}]
    assert read().categories == {1: "category 1", 2: "1"}


def test_no_categories(coco, refusal):
    coco.content["categories"] = []
    assert "'categories' is empty" in refusal()


@pytest.mark.parametrize("supers", [("animal", "animal"), (None, None)])
def test_two_ids_of_one_class(coco, read, supers):
    """Files of several annotators, merged: each has numbered the classes anew."""
    coco.content["categories"] = [
        {"id": 1, "name": "cat", "supercategory": supers[0]},
        {"id": 2, "name": "cat", "supercategory": supers[1]},
        {"id": 3, "name": "dog"},
    ]
    coco.content["annotations"][2]["category_id"] = 3
    found = read()
    assert found.categories == {1: "cat", 3: "dog"}
    assert found.category_index.tolist() == [0, 0, 1]
    assert found.summary() == "categories have the name of another one and count as that: 1"


def test_unused_class_of_the_same_name(coco, read):
    """Roboflow's files have a class of the data set's name that no box is of, numbered 0."""
    coco.content["categories"].insert(0, {"id": 0, "name": "dog", "supercategory": "none"})
    coco.content["categories"][2]["supercategory"] = "animal"
    found = read()
    assert found.categories == {1: "cat", 2: "dog"}
    assert found.category_index.tolist() == [0, 1, 1]


def test_two_classes_of_one_name(coco, refusal):
    coco.content["categories"] = [
        {"id": 1, "name": "crane", "supercategory": "bird"},
        {"id": 2, "name": "crane", "supercategory": "machine"},
    ]
    expected = "two classes are called 'crane': the categories 1 of 'bird' and 2 of 'machine'"
    assert expected in refusal()
