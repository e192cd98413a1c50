"""Wrong exports are noticed, and good data sets are not suspected."""

import re
import time

from ddetr_d2.data.coco import CocoAnnotations, CocoImage, CocoSource, read_annotations
from ddetr_d2.data.coco.suspicions import find_suspicious, repeated_boxes
from ddetr_d2.data.synthetic import make_synthetic

import numpy as np
import pytest

WIDTH, HEIGHT = 640, 480


def data_set(boxes, image=None, category=None, *, images=None, names=("cat", "dog"), crowd=None):
    """A data set of images of 640 x 480 pixels; by default ten boxes in an image."""
    boxes = np.array(boxes, dtype=float).reshape(-1, 4)
    number = len(boxes)
    image = np.arange(number) // 10 if image is None else np.array(image)
    category = np.arange(number) % len(names) if category is None else np.array(category)
    images = int(image.max(initial=0)) + 1 if images is None else images
    return CocoAnnotations(
        CocoSource("pets", "pets.json", "photos"),
        dict(enumerate(names, start=1)),
        [CocoImage(i, f"{i}.jpg", f"photos/{i}.jpg", WIDTH, HEIGHT) for i in range(images)],
        image,
        category,
        boxes,
        boxes[:, 2] * boxes[:, 3],
        np.zeros(number, dtype=bool) if crowd is None else np.array(crowd),
        total=number,
    )


def random_boxes(number: int, seed: int = 0) -> np.ndarray:
    """(number, 4) x, y, width, height inside the image, of all sizes."""
    rng = np.random.default_rng(seed)
    size = np.array([WIDTH, HEIGHT])
    sides = np.exp(rng.uniform(np.log(8), np.log(400), (number, 2)))
    return np.concatenate((rng.uniform(0, 1, (number, 2)) * (size - sides), sides), axis=1).round(2)


def corners(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), axis=1)


def the_one(annotations: CocoAnnotations) -> str:
    (sentence,) = find_suspicious(annotations)
    return sentence


def test_a_good_data_set_is_not_suspected():
    assert find_suspicious(data_set(random_boxes(300))) == []


def test_the_synthetic_set_is_not_suspected(tmp_path):
    make_synthetic(tmp_path, train=30, val=0)
    source = CocoSource("shapes", str(tmp_path / "train.json"), str(tmp_path / "train"))
    assert find_suspicious(read_annotations(source)) == []


def test_fractions():
    boxes = random_boxes(50) / [WIDTH, HEIGHT, WIDTH, HEIGHT]
    sentence = the_one(data_set(boxes))
    assert sentence.startswith("50 of 50 boxes lie within 0 to 1")
    first = ", ".join(f"{value:.6g}" for value in boxes[0])
    assert f"[{first}] of class 'cat' in image 0.jpg of 640 x 480 pixels" in sentence
    assert "multiply" in sentence


def test_fractions_among_good_boxes():
    boxes = random_boxes(50)
    boxes[20:30] /= [WIDTH, HEIGHT, WIDTH, HEIGHT]
    assert the_one(data_set(boxes)).startswith("10 of 50 boxes lie within 0 to 1")


@pytest.mark.parametrize(
    ("layout", "change"),
    [
        ("corners x0, y0, x1, y1", corners),
        ("corners y0, x0, y1, x1", lambda boxes: corners(boxes)[:, [1, 0, 3, 2]]),
        (
            "center x, center y, width, height",
            lambda boxes: np.concatenate((boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]), axis=1),
        ),
        ("y, x, height, width", lambda boxes: boxes[:, [1, 0, 3, 2]]),
    ],
)
def test_other_layouts(layout, change):
    sentence = the_one(data_set(change(random_boxes(200))))
    assert sentence.startswith(f"boxes look like {layout}, but are read as x, y, width, height")
    far = int(re.search(r"(\d+) of 200 boxes reach far beyond", sentence)[1])
    assert 10 < far < 200
    assert "of class" in sentence and "Convert" in sentence


def test_corners_in_a_set_of_two_boxes():
    assert "corners x0" in the_one(data_set([[400, 300, 500, 400], [20, 10, 60, 40]]))


def test_sizes_that_do_not_fit_the_images():
    boxes = random_boxes(100)
    boxes[:30] = [600, 400, 300, 200]
    boxes[:30, 0] += np.arange(30)  # to be different ones
    sentence = the_one(data_set(boxes))
    assert sentence.startswith("30 of 100 boxes have more than half of their area outside")
    # A few objects that are cut off by the border are usual where their hidden part is annotated.
    boxes[3:] = random_boxes(97)
    assert find_suspicious(data_set(boxes)) == []


def test_boxes_of_smaller_copies():
    sentence = the_one(data_set(random_boxes(100) * 0.4))
    assert sentence.startswith("no box reaches beyond 40% of the width and 40% of the height")


def test_whole_images():
    boxes = np.tile([0.0, 0, WIDTH, HEIGHT], (20, 1))
    sentence = the_one(data_set(boxes, np.arange(20)))
    assert sentence.startswith("20 of 20 boxes cover their whole image")
    boxes[:10] = random_boxes(10)
    assert find_suspicious(data_set(boxes, np.arange(20))) == []


def test_crowds():
    crowd = np.arange(40) < 30
    sentence = the_one(data_set(random_boxes(40), crowd=crowd))
    assert sentence.startswith("30 of 40 boxes are marked as crowds")
    assert "DATASETS.CROWDS_ARE_OBJECTS True" in sentence
    assert find_suspicious(data_set(random_boxes(40), crowd=np.arange(40) < 5)) == []
    assert "40 of 40" in the_one(data_set(random_boxes(40), crowd=np.ones(40, dtype=bool)))


def test_repeated_boxes():
    boxes = random_boxes(100)
    boxes[55] = boxes[51]  # same image, same class
    boxes[66] = boxes[61]  # same image, other class
    boxes[88] = boxes[78]  # other image
    annotations = data_set(boxes)
    assert repeated_boxes(annotations).tolist() == [55]
    sentence = the_one(annotations)
    assert sentence.startswith("1 of 100 boxes repeats another one of the same class and image")
    assert "image 5.jpg" in sentence
    # COCO has a few.
    boxes = np.concatenate((boxes, random_boxes(400, seed=1)))
    assert find_suspicious(data_set(boxes)) == []


def test_repeated_boxes_do_not_count_crowds():
    annotations = data_set([[1, 2, 3, 4], [1, 2, 3, 4]], category=[0, 0], crowd=[True, False])
    assert repeated_boxes(annotations).tolist() == []


def test_unused_classes():
    names = ["cat", "dog", "animals", *(f"kind {i}" for i in range(6))]
    sentence = the_one(data_set(random_boxes(40), category=np.arange(40) % 2, names=names))
    assert sentence.startswith("7 of 9 classes have no box: 'animals', 'kind 0'")
    assert "and 2 more" in sentence


def test_a_class_of_one_image():
    image = np.arange(200) // 5
    category = np.zeros(200, dtype=int)
    image[:40], category[:41] = 3, 1  # 40 of 41 dogs
    sentence = the_one(data_set(random_boxes(200), image, category))
    assert sentence.startswith("40 of 41 boxes of class 'dog' are in image 3.jpg")
    assert "image_id" in sentence


def test_everything_in_one_image():
    concentrated, empty = find_suspicious(data_set(random_boxes(50), [0] * 50, images=15))
    assert "25 of 25 boxes of class 'cat' are in image 0.jpg, 25 of 25" in concentrated
    assert empty.startswith("14 of 15 images have no box")


def test_crowded_images_of_one_class_each_are_not_suspected():
    image = np.arange(600) // 30
    names = [f"fruit {i}" for i in range(20)]
    assert find_suspicious(data_set(random_boxes(600), image, image, names=names)) == []


def test_a_crowded_image_of_its_own_class_for_most_classes_is_not_suspected():
    crowded, mixed = np.arange(500) // 100, 5 + np.arange(50) // 5
    category = np.concatenate((crowded, np.arange(50) % 5))
    image = np.concatenate((crowded, mixed))
    assert find_suspicious(data_set(random_boxes(550), image, category, names="ABCDE")) == []


def test_a_rare_class_of_one_image_is_not_suspected():
    image = np.arange(600) // 20
    category = np.where(np.arange(600) < 15, 1, 0)
    assert find_suspicious(data_set(random_boxes(600), image, category)) == []


def test_mostly_empty():
    sentence = the_one(data_set(random_boxes(30), images=20))
    assert sentence.startswith("17 of 20 images have no box, the first is 3.jpg")
    assert find_suspicious(data_set(random_boxes(30), images=5)) == []


def test_sets_without_any_box_are_not_suspected():
    assert find_suspicious(data_set([], images=20)) == []


def test_one_file_under_several_ids():
    annotations = data_set(random_boxes(50))
    annotations.images[3] = CocoImage(77, "x/../1.jpg", "photos/x/../1.jpg", WIDTH, HEIGHT)
    sentence = the_one(annotations)
    assert sentence.startswith("1 of 4 image files stands under several ids in 'images'")
    assert "1.jpg has 1, 77" in sentence


@pytest.mark.parametrize(
    "names", [("Traffic light", "traffic_light"), ("Cat", "cat"), ("fire hydrant", "FireHydrant")]
)
def test_similar_names(names):
    sentence = the_one(data_set(random_boxes(50), names=names))
    assert f"{names[0]!r} and {names[1]!r}" in sentence


@pytest.mark.parametrize("names", [("a", "A"), ("C", "C++"), ("1-2", "12"), ("A+", "A-")])
def test_different_names(names):
    assert find_suspicious(data_set(random_boxes(50), names=names)) == []


def test_half_a_million_boxes_take_seconds():
    number = 500_000
    annotations = data_set(random_boxes(number), names=[f"class {i}" for i in range(80)])
    start = time.process_time()
    assert find_suspicious(annotations) == []
    assert time.process_time() - start < 5
