"""The report on data sets: its numbers, duplicates of images, and its text."""

import dataclasses
import json
import os
import shutil

from ddetr_d2.data.coco import CocoSource, read_annotations
from ddetr_d2.data.report import (
    compare_classes,
    describe,
    find_duplicates,
    full_text,
    report_on,
    short_report,
)
from ddetr_d2.data.report import duplicates as duplicates_module
from ddetr_d2.data.report.data_set import count_sizes

import numpy as np
import pytest
from PIL import Image


def read(folder, name="train"):
    folder.write()
    return read_annotations(CocoSource(name, str(folder.json_file), str(folder.images)))


def add_box(folder, image_id, box, category_id=1, area=None, **more):
    annotations = folder.content["annotations"]
    area = box[2] * box[3] if area is None else area
    row = {"id": len(annotations) + 1, "image_id": image_id, "category_id": category_id}
    annotations.append(row | {"bbox": box, "area": area, "iscrowd": 0} | more)


@pytest.fixture
def changed_images(other_coco):
    """``other_coco`` with images of other content than those of ``coco``."""
    for path in other_coco.images.iterdir():
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    return other_coco


def test_numbers_of_a_data_set(coco, cfg):
    add_box(coco, 1, [1, 1, 2, 2], area=32 * 32)
    add_box(coco, 1, [1, 1, 2, 2], area=96 * 96)
    add_box(coco, 1, [0, 0, 40, 30], iscrowd=1)
    add_box(coco, 2, [20, 40, 15, 9])  # beyond the border
    add_box(coco, 2, [5, 5, 0, 10])
    report = describe(read(coco), cfg, "training")
    assert (report.images, report.images_without_objects) == (3, 1)
    assert (report.annotations, report.objects, report.crowds) == (8, 6, 1)
    # An area that is larger than the image is none.
    assert vars(report.sizes) == {"small": 4, "medium": 2, "large": 0}
    sizes = count_sizes(np.array([32**2 - 1, 32**2, 96**2 - 1, 96**2]))
    assert vars(sizes) == {"small": 1, "medium": 2, "large": 1}
    assert [(c.name, c.objects, c.images, c.crowds) for c in report.classes] == [
        ("cat", 4, 2, 1),
        ("dog", 2, 2, 0),
    ]
    assert vars(report.classes[0].sizes) == {"small": 3, "medium": 1, "large": 0}
    assert report.objects_beyond_image == 1
    assert report.repeated_objects == 1
    assert [(reason, left.count) for reason, left in report.left_out.items()] == [("are empty", 1)]
    assert any("repeats another one" in sentence for sentence in report.suspicions)
    per_image = report.objects_per_image
    assert (per_image.least, per_image.median, per_image.most) == (0, 2, 4)


def test_sizes_are_those_after_the_resize(coco, cfg):
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (80, 120, 100), 160
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 400, 1000
    annotations = read(coco)
    resize = describe(annotations, cfg, "training").resize
    assert (resize.shortest_sides, resize.shortest, resize.longest) == ((80, 120), 100, 160)
    # 60 x 40 becomes 150 x 100, 30 x 50 is limited to 96 x 160, 20 x 20 becomes 100 x 100.
    widths, heights = vars(resize.image_width), vars(resize.image_height)
    assert [widths[key] for key in ("least", "median", "most")] == [96, 100, 150]
    assert [heights[key] for key in ("least", "median", "most")] == [100, 100, 160]
    assert resize.image_aspect.most == 1.5
    assert resize.object_size.least == pytest.approx(2.5 * (20 * 10) ** 0.5)
    assert resize.object_size.most == pytest.approx((96 * 160) ** 0.5)
    assert resize.object_aspect.most == 2
    resize = describe(annotations, cfg, "test").resize
    assert (resize.shortest, resize.image_width.most) == (400, 600)


def test_a_range_of_sizes_counts_with_its_middle(coco, cfg):
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = (100, 300), "range"
    assert describe(read(coco), cfg, "training").resize.shortest == 200


def test_objects_of_less_than_a_cell_are_counted(coco, cfg):
    cfg.INPUT.MIN_SIZE_TEST = 40
    add_box(coco, 1, [1, 1, 7, 30])
    add_box(coco, 1, [55, 20, 30, 10])  # 5 pixels of it are in the image
    add_box(coco, 1, [1, 1, 8, 8])
    assert describe(read(coco), cfg, "test").resize.tiny_objects == 2


def test_objects_beyond_the_configured_limits(coco, cfg):
    cfg.MODEL.DEFORMABLE_DETR.NUM_QUERIES, cfg.TEST.DETECTIONS_PER_IMAGE = 2, 1
    annotations = read(coco)
    add_box(coco, 1, [1, 1, 9, 9])
    report = report_on([], [read(coco, "val")], cfg)
    part = report.data_sets[0]
    assert (part.images_over_queries, part.images_over_detections) == (1, 1)
    text = " ".join(full_text(report).split())
    assert "1 image with more objects than object queries (2), the most objects in one is 3" in text
    assert "raise TEST.DETECTIONS_PER_IMAGE" in text
    assert "NUM_QUERIES" not in full_text(report_on([annotations], [], cfg))


def test_sets_without_boxes_have_a_report(coco, cfg):
    coco.content["annotations"] = []
    report = report_on([read(coco)], [], cfg)
    assert report.data_sets[0].resize.object_size is None
    assert "width of images" in full_text(report)
    assert short_report([read(coco)])[0] == (
        "train: 3 images, 0 boxes (0 small, 0 medium, 0 large), 2 classes, 3 images without boxes"
    )


def test_the_report_fits_json(coco, other_coco, cfg):
    report = report_on([read(coco)], [read(other_coco, "val")], cfg)
    content = json.loads(json.dumps(dataclasses.asdict(report)))
    assert content["data_sets"][0]["classes"][1]["name"] == "dog"
    assert content["shared_images"][0]["test_images"] == 3


@pytest.fixture
def files(tmp_path):
    """Write files of the given contents; returns their paths."""

    def write(**contents: bytes) -> list[str]:
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content)
        return [str(tmp_path / name) for name in contents]

    return write


def test_duplicates_are_told_by_content(files):
    long = bytes(100_000)
    a, b, c, d, e, f = files(
        a=b"x" * 9, b=b"y" * 9, c=b"x" * 9, d=long + b"1", e=long + b"2", f=long + b"1"
    )
    found = find_duplicates({"one": [a, b, d], "two": [c, e, f]})
    assert found.groups == [{"one": [a], "two": [c]}, {"one": [d], "two": [f]}]
    assert found.shared("one", "two") == [(a, c), (d, f)]
    assert found.repeated_in("one") == 0 and found.unchecked == 0


def test_duplicates_within_a_set(files):
    a, b, c = files(a=b"x", b=b"x", c=b"x")
    found = find_duplicates({"one": [a, b, c, a]})
    assert found.groups == [{"one": [a, b, c]}]
    assert found.repeated_in("one") == 2


def test_one_file_in_two_sets_is_not_opened(files, monkeypatch):
    a, b = files(a=b"x", b=b"y" * 3)
    linked = f"{a}_linked"
    os.link(a, linked)
    monkeypatch.setattr(duplicates_module, "open", lambda *_: pytest.fail("opened"), raising=False)
    assert find_duplicates({"one": [a, b], "two": [a]}).shared("one", "two") == [(a, a)]
    assert find_duplicates({"one": [a, b], "two": [linked]}).shared("one", "two") == [(a, linked)]


def test_only_what_two_groups_of_sets_share_is_opened(files, monkeypatch):
    a, b, c, d, e = files(a=b"x", b=b"x", c=b"zz", d=b"zz", e=b"z" * 4)
    opened = []
    monkeypatch.setattr(
        duplicates_module,
        "open",
        lambda path, *args, **options: opened.append(path) or open(path, *args, **options),
        raising=False,
    )
    found = find_duplicates({"one": [a, b, c], "two": [d, e]}, (["one"], ["two"]))
    assert found.shared("one", "two") == [(c, d)]
    assert set(opened) == {c, d}


def test_files_that_cannot_be_looked_at_are_counted(files, tmp_path):
    a, b = files(a=b"x", b=b"x")
    found = find_duplicates({"one": [a, b, str(tmp_path / "missing"), str(tmp_path)]})
    assert (len(found.groups), found.unchecked) == (1, 2)


def test_images_of_training_in_the_test_set(coco, changed_images, cfg):
    training, test = read(coco), read(changed_images, "val")
    assert report_on([training], [test], cfg).shared_images == []
    assert not any(line.startswith("warning") for line in short_report([training], [test]))

    shutil.copy(coco.images / "a.png", changed_images.images / "a.png")
    (shared,) = report_on([training], [test], cfg).shared_images
    assert (shared.training, shared.test, shared.test_images) == ("train", "val", 1)
    assert shared.examples == [(training.images[0].path, test.images[0].path)]
    *_, line = short_report([training], [test])
    assert line.startswith("warning: 1 image of val (test) is in train (training) as well")
    assert str(changed_images.images / "a.png") in line


def test_a_set_that_is_trained_on_and_tested_on(coco, cfg):
    both = read(coco)
    lines = short_report([both], [both])
    assert len(lines) == 2
    assert lines[1].startswith("warning: train is trained on and tested on")
    assert len(report_on([both], [both], cfg).data_sets) == 2


def test_short_report(coco, changed_images):
    add_box(coco, 1, [0, 0, 40, 30], iscrowd=1)
    add_box(coco, 1, [5, 5, 20, 10])
    add_box(coco, 1, [99, 5, 20, 10])
    first, second, warning = short_report([read(coco)], [read(changed_images, "val")])
    assert first == (
        "train: 3 images, 4 boxes (3 small, 1 medium, 0 large), 2 classes, 1 image without boxes, "
        "1 crowd, 1 box left out"
    )
    assert second.startswith("val: 3 images, 3 boxes")
    assert warning.startswith("warning: train: 1 of 4 boxes repeats another one")


def test_classes_are_compared_by_name(coco, other_coco):
    other_coco.content["categories"] = [{"id": 7, "name": "Dog"}, {"id": 9, "name": "cow"}]
    for annotation in other_coco.content["annotations"]:
        annotation["category_id"] += 6
    for annotation in other_coco.content["annotations"][1:]:
        annotation["category_id"] = 9
    (difference,) = compare_classes([read(coco)], [read(other_coco, "val")])
    assert difference.only_in_training == ["cat"]
    assert difference.only_in_test == ["cow"]
    assert compare_classes([read(coco)], [read(coco, "val")]) == []


def test_text_fits_a_terminal(coco, changed_images, cfg):
    coco.content["categories"] += [{"id": i, "name": f"kind {i} " * 12} for i in range(3, 100)]
    add_box(coco, 1, [1, 1, 0, 2])
    add_box(coco, 1, [1, 1, 4, 2], category_id="2")
    cfg.INPUT.MIN_SIZE_TRAIN = (480, 800)
    report = report_on([read(coco)], [read(changed_images, "val")], cfg)
    for part in report.data_sets:  # names of files can be of any length
        part.json_file = part.image_root = ""
    text = full_text(report)
    long = [line for line in text.splitlines() if len(line) > 100 and str(coco.root) not in line]
    assert not long
    assert "... 59 classes of 0 to 0" in text
    assert "1 is empty; the first: annotation 4, [1, 1, 0, 2] in image a.png" in text
    assert "ids given as text were taken as numbers: 1" in text
    assert "97 classes only in train" in text
