"""Odd boxes, masks, crowds and sizes in annotation files."""

import numpy as np
from odd_input import BOXES, kind, without_first
from pycocotools import mask


def polygon(box: list[float]) -> list[float]:
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


@kind(said="areas taken as width x height of the box: 3")
def no_area_and_no_iscrowd(data):
    """Label Studio, labelme2coco."""
    for row in data.each("annotations"):
        del row["area"], row["iscrowd"]


@kind(said="values of 'iscrowd' absent or no number, .*: 3")
def iscrowd_is_false(data):
    for row, value in zip(data.each("annotations"), (False, None, "0"), strict=True):
        row["iscrowd"] = value


@kind(refused=r"all annotations \(3\) are of crowds .* set DATASETS.CROWDS_ARE_OBJECTS True")
def masks_marked_as_crowds(data):
    """CVAT, Datumaro: masks have "iscrowd": 1."""
    for row in data.each("annotations"):
        row["iscrowd"] = 1


@kind()
def masks_marked_as_crowds_taken_as_objects(data):
    masks_marked_as_crowds(data)
    data.options += ["DATASETS.CROWDS_ARE_OBJECTS", "True"]


@kind(boxes=without_first())
def crowd_among_objects(data):
    """COCO: a crowd is neither to be found nor wrong to be found."""
    data.first["iscrowd"] = 1
    data.content["categories"].pop(0)
    data.first["category_id"] = 2


@kind(boxes=without_first(), said="annotations with 'ignore' set taken as crowds: 1")
def ignored_object(data):
    """Objects marked as difficult, converted from Pascal VOC."""
    data.first.update(ignore=1, category_id=2)
    data.content["categories"].pop(0)


@kind(said="boxes taken from 'segmentation': 3")
def polygons_without_boxes(data):
    """labelme2coco variants and COCO Annotator."""
    for row in data.each("annotations"):
        row["segmentation"] = [polygon(row.pop("bbox"))]


@kind(said="boxes taken from 'segmentation': 3")
def flat_polygons_without_boxes(data):
    for row in data.each("annotations"):
        row["segmentation"] = polygon(row["bbox"])
        row["bbox"] = []


@kind()
def flat_polygons(data):
    """VGG Image Annotator: pycocotools ends in a traceback."""
    for row in data.each("annotations"):
        row["segmentation"] = polygon(row["bbox"])


def pixels_of(data, row) -> np.ndarray:
    image = next(i for i in data.content["images"] if i["id"] == row["image_id"])
    pixels = np.zeros((image["height"], image["width"]), dtype=np.uint8, order="F")
    x, y, w, h = row.pop("bbox")
    pixels[y : y + h, x : x + w] = 1
    return pixels


@kind(said="boxes taken from 'segmentation': 3")
def compressed_masks_without_boxes(data):
    """Detectron2, SAM: counts as a text."""
    for row in data.each("annotations"):
        found = mask.encode(pixels_of(data, row))
        row["segmentation"] = found | {"counts": found["counts"].decode()}


@kind(said="boxes taken from 'segmentation': 3")
def uncompressed_masks_without_boxes(data):
    """CVAT, Label Studio's brush: counts as a list."""
    for row in data.each("annotations"):
        pixels = pixels_of(data, row)
        flat = pixels.ravel(order="F")
        starts = np.flatnonzero(np.diff(np.concatenate(([0], flat)))).tolist()
        counts = np.diff([0, *starts, flat.size]).tolist()
        row["segmentation"] = {"size": list(pixels.shape), "counts": counts}


@kind()
def segmentations_of_any_kind(data):
    """Detectron2's loader drops such boxes in silence, or ends in a traceback."""
    for row, value in zip(
        data.each("annotations"), ([[1, 2, 3, 4]], "", {"a": [None]}), strict=True
    ):
        row["segmentation"] = value


@kind()
def keypoints(data):
    """COCO's file of people."""
    for row in data.each("annotations"):
        row.update(keypoints=[None, "x", {}], num_keypoints=-1)
    data.content["categories"][0].update(keypoints=["nose"], skeleton=[[1, 2]])


@kind(boxes=without_first(), left_out=1, said="1 has no four finite numbers, the first: .*\\[\\]")
def box_is_an_empty_list(data):
    """Labels of a whole image in FiftyOne and Roboflow."""
    data.first["bbox"] = []
    data.first["category_id"] = 2
    data.content["categories"].pop(0)


def without_cat(data, box) -> None:
    data.content["categories"].pop(0)
    data.first.update(category_id=2, bbox=box)


@kind(boxes=without_first(), left_out=1, said="1 has no four finite numbers")
def box_is_null(data):
    without_cat(data, None)


@kind(boxes=without_first(), left_out=1, said="1 has no four finite numbers")
def box_has_three_numbers(data):
    without_cat(data, [5, 5, 20])


@kind(boxes=without_first(), left_out=1, said="1 has no four finite numbers")
def box_is_an_object(data):
    """Supervisely, Label Studio: {"x": ..., "y": ...}"""
    without_cat(data, {"x": 5, "y": 5, "width": 20, "height": 10})


@kind(boxes=without_first(), left_out=1, said="1 has no four finite numbers, .*nan")
def box_is_nan(data):
    """pandas, and 0 / 0: Python writes NaN, which is no JSON."""
    without_cat(data, [float("nan")] * 4)


@kind(boxes=without_first(), left_out=1, said="1 has no four finite numbers")
def box_is_infinite(data):
    without_cat(data, [5, 5, float("inf"), 10])


@kind(boxes=without_first(), left_out=1, said="1 is empty")
def box_of_a_click(data):
    """A click in place of a drag."""
    without_cat(data, [5, 5, 0, 0])


@kind(boxes=without_first(), left_out=1, said="1 is empty")
def box_drawn_from_right_to_left(data):
    without_cat(data, [25, 15, -20, -10])


@kind(boxes=without_first(), left_out=1, said="1 is empty")
def box_that_32_bits_cannot_tell_from_none(data):
    without_cat(data, [40, 20, 1e-9, 10])


@kind(boxes=without_first(), left_out=1, said="1 lies outside the image")
def box_outside(data):
    """Annotated on an image that was cropped afterwards."""
    without_cat(data, [64, 5, 10, 10])


@kind(boxes={**BOXES, "a.jpg": [("cat", [-5, -5, 30, 20]), BOXES["a.jpg"][1]]})
def box_partly_outside(data):
    """Supervisely, Label Studio: drawn beyond the border."""
    data.first["bbox"] = [-5, -5, 30, 20]


@kind()
def boxes_of_texts(data):
    """A spreadsheet."""
    for row in data.each("annotations"):
        row["bbox"] = [str(value) for value in row["bbox"]]


@kind(boxes={**BOXES, "a.jpg": [("cat", [5.123456789012345, 5, 1 / 3, 10]), BOXES["a.jpg"][1]]})
def boxes_with_fractions(data):
    data.first["bbox"] = [5.123456789012345, 5, 1 / 3, 10]


@kind(refused="no image has a usable box, .* 3 of 3 boxes are left out .* 3 are empty")
def all_boxes_empty(data):
    for row in data.each("annotations"):
        row["bbox"] = [0, 0, 0, 0]


@kind(said="image sizes were read from the image files: 2")
def no_width_and_height(data):
    """Label Studio without image processing, hand-made scripts."""
    for row in data.each("images"):
        del row["width"], row["height"]


@kind(said="image sizes were read from the image files: 2")
def width_and_height_null_or_0(data):
    for row, value in zip(data.each("images"), (None, 0), strict=True):
        row.update(width=value, height=value)


@kind()
def width_and_height_are_texts(data):
    for row in data.each("images"):
        row.update(width=str(row["width"]), height=f"{row['height']}.0")


@kind(refused="1 of 2 images .* a.jpg is given as 48 x 64 and has 64 x 48 pixels")
def width_and_height_swapped(data):
    """array.shape taken for width and height."""
    data.content["images"][0].update(width=48, height=64)


@kind(refused="2 of 2 images .* a.jpg is given as 128 x 96 and has 64 x 48 pixels")
def images_resized_after_annotation(data):
    for row in data.each("images"):
        row.update(width=2 * row["width"], height=2 * row["height"])


@kind(refused="image a.jpg has 400 objects, more than the 300 object queries")
def more_objects_than_queries(data):
    for number in range(398):
        data.add(1, 2, [number % 20, number // 20, 5, 5])


MANY = [("dog", [2 * (n % 30), 2 * (n // 30), 1, 1]) for n in range(240)]


@kind(boxes={"a.jpg": [*BOXES["a.jpg"], *MANY], "b.png": BOXES["b.png"]})
def more_objects_than_coco_counts(data):
    """Cells, crowds of people: COCO's evaluation counts 100 detections of an image."""
    for _, box in MANY:
        data.add(1, 2, box)
