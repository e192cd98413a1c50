"""Odd ids and classes in annotation files."""

import copy

from odd_input import BOXES, Data, kind


def refer(data: Data, key: str, of: str, name) -> None:
    """Give the rows of ``of`` the ids ``name(id)``, and the annotations' ``key`` too."""
    for row in data.content[of]:
        row["id"] = name(row["id"])
    for row in data.content["annotations"]:
        row[key] = name(row[key])


@kind()
def clean(data):
    """A file as it should be."""


@kind()
def annotation_ids_from_0(data):
    """labelme2coco and many scripts: pycocotools counts the object with id 0 as missed."""
    for row in data.each("annotations"):
        row["id"] -= 1


@kind()
def all_ids_from_0(data):
    """VGG Image Annotator, scripts with enumerate()."""
    for row in data.each("images", "annotations", "categories"):
        row["id"] -= 1
    for row in data.each("annotations"):
        row["image_id"] -= 1
        row["category_id"] -= 1


@kind(said="ids given as text")
def image_id_is_text(data):
    """VGG Image Annotator: "image_id": "1" where the image has 1."""
    for row in data.each("annotations"):
        row["image_id"] = str(row["image_id"])


@kind()
def ids_are_floats(data):
    """pandas: a column with a gap becomes one of floats."""
    for key, of in (("image_id", "images"), ("category_id", "categories")):
        refer(data, key, of, float)


@kind(said="ids given as text")
def references_are_texts_of_floats(data):
    """A spreadsheet saved as CSV and read back."""
    for row in data.each("annotations"):
        row["image_id"], row["category_id"] = f"{row['image_id']}.0", f"{row['category_id']}.0"


@kind()
def image_ids_are_names(data):
    """Scripts that take the file name without its suffix for the id."""
    refer(data, "image_id", "images", {1: "IMG_0001", 2: "IMG_0002"}.get)


@kind()
def image_ids_are_uuids_and_hashes(data):
    refer(
        data, "image_id", "images", {1: "550e8400-e29b-41d4-a716-446655440000", 2: "9e107d9d"}.get
    )


@kind()
def image_ids_beyond_64_bits(data):
    """Hashes as whole numbers."""
    refer(data, "image_id", "images", lambda id: id * 10**30)


@kind()
def negative_ids(data):
    refer(data, "image_id", "images", lambda id: -id)


@kind(said="ids given as text")
def references_with_zeros_in_front(data):
    """ "000000000001" cut out of a file name."""
    for row in data.each("annotations"):
        row["image_id"] = f"{row['image_id']:012}"


@kind()
def no_annotation_ids(data):
    """Hand-made scripts."""
    for row in data.each("annotations"):
        del row["id"]


@kind(said="annotations have the id of another one; they were numbered anew: 2")
def one_annotation_id_for_all(data):
    for row in data.each("annotations"):
        row["id"] = 0


@kind(said="repeated rows of 'annotations' taken once: 3")
def annotations_twice(data):
    """A file merged with itself."""
    data.content["annotations"] += copy.deepcopy(data.content["annotations"])


@kind(said="repeated rows of 'images' taken once: 3")
def image_row_for_each_annotation(data):
    """Scripts that go through annotations."""
    data.content["images"] += [*data.content["images"], data.content["images"][0]]


@kind(said="repeated rows of 'categories' taken once: 2")
def category_row_for_each_annotation(data):
    """VGG Image Annotator."""
    data.content["categories"] *= 2


@kind(refused=r"one id stands for two images: 1 is a.jpg \(64 x 48\) and 1 is b.png \(40 x 56\)")
def merged_without_new_image_ids(data):
    """Two files put together, each numbered from 1."""
    data.content["images"][1]["id"] = 1


@kind(refused="one id stands for two classes: 1 is 'cat' and 1 is 'dog'")
def merged_without_new_category_ids(data):
    data.content["categories"][1]["id"] = 1


@kind(refused="2 of 3 annotations have a category_id that is not in 'categories': the first is 2")
def classes_dropped_but_not_their_boxes(data):
    del data.content["categories"][1]


@kind(refused="3 of 3 annotations have a category_id .* the first is None")
def no_category_id(data):
    """Annotations of a panoptic set, or of a segmentation without classes."""
    for row in data.each("annotations"):
        del row["category_id"]


@kind(
    boxes={"a.jpg": BOXES["a.jpg"]},
    left_out=1,
    said="1 is of an image that is not in 'images', the first: annotation 3 of image 2",
)
def images_split_but_not_annotations(data):
    """Hand-made splits into training and test set."""
    del data.content["images"][1]


@kind(boxes={**BOXES, "c.jpg": []})
def image_without_objects(data):
    data.save("c.jpg")
    data.content["images"].append({"id": 3, "file_name": "c.jpg", "width": 64, "height": 48})


def spelt(**names: str) -> dict:
    return {file: [(names[name], box) for name, box in objects] for file, objects in BOXES.items()}


@kind(boxes=spelt(cat="traffic light", dog="dog"))
def class_names_with_spaces_and_line_ends(data):
    """Lines of a text file that were not stripped."""
    data.content["categories"][0]["name"] = " traffic  light\r\n"


@kind(boxes=spelt(cat="0", dog="1"))
def class_names_are_numbers(data):
    """Digits, converted from YOLO."""
    for number, row in enumerate(data.content["categories"]):
        row["name"] = number


@kind(
    boxes=spelt(cat="category 1", dog="dog"),
    said="categories without a name, called by their ids: 1",
)
def class_without_a_name(data):
    del data.content["categories"][0]["name"]


@kind(boxes=spelt(cat="猫", dog="собака"))
def class_names_in_other_scripts(data):
    for row, name in zip(data.content["categories"], ("猫", "собака"), strict=True):
        row["name"] = name


@kind(boxes=spelt(cat="\\ud83d", dog="dog"))
def class_name_with_half_a_character(data):
    """Cut in the middle of an emoji by a program that counts in UTF-16."""
    data.content["categories"][0]["name"] = "\ud83d"


@kind()
def category_ids_with_gaps(data):
    refer(data, "category_id", "categories", {1: 17, 2: 90}.get)


@kind()
def categories_out_of_order(data):
    data.content["categories"].reverse()


@kind(said="categories have the name of another one .*: 1")
def roboflow_class_0(data):
    """Roboflow: class 0 is named as the project, maybe as one of its classes, and unused."""
    data.content["categories"].insert(0, {"id": 0, "name": "dog", "supercategory": "none"})


@kind(said="categories have the name of another one .*: 1")
def one_class_under_two_ids(data):
    """Files of several annotators, merged."""
    data.content["categories"].append({"id": 3, "name": "dog"})
    data.content["annotations"][2]["category_id"] = 3


@kind(refused="two classes are called 'crane': the categories 1 of 'bird' and 2 of 'machine'")
def two_classes_of_one_name(data):
    for row, of in zip(data.content["categories"], ("bird", "machine"), strict=True):
        row.update(name="crane", supercategory=of)


@kind()
def class_that_is_not_used(data):
    data.content["categories"].append({"id": 3, "name": "unicorn"})


@kind(refused="entry 1 of 'categories' is no object: 'cat'")
def categories_are_texts(data):
    """Hand-made."""
    data.content["categories"] = ["cat", "dog"]


@kind(refused="'categories' is empty")
def no_category(data):
    data.content["categories"] = []


@kind(refused="'images' is empty")
def no_image(data):
    data.content["images"] = []


@kind(refused="entry 1 of 'images' .* has no file name: 'file_name' is None")
def no_file_name(data):
    """Scripts that write "filename", "path" or "file"."""
    row = data.content["images"][0]
    row["filename"] = row.pop("file_name")


@kind(refused="entry 1 of 'images' has no id: 'id' is None")
def no_image_id(data):
    del data.content["images"][0]["id"]


@kind(refused="it has no 'annotations'")
def no_annotations_key(data):
    """COCO's file of unlabelled images."""
    del data.content["annotations"]


@kind(refused="it has no annotations")
def no_annotation(data):
    data.content["annotations"] = []


@kind(refused="its 'annotations' is no list")
def annotations_by_id(data):
    """Hand-made: an object in the place of a list."""
    data.content["annotations"] = {str(row["id"]): row for row in data.content["annotations"]}
