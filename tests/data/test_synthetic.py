"""The synthetic data set."""

import json
from collections import Counter

from ddetr_d2.data import register_datasets
from ddetr_d2.data.shapes import CLASSES, SyntheticOptions, _coverage, _place, draw_image
from ddetr_d2.data.synthetic import main, make_synthetic
from ddetr_d2.errors import UserError

import cv2
import numpy as np
import pytest


def files_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_same_seed_same_files_and_more_images_extend(tmp_path):
    for name, train, seed in (("a", 4, 3), ("b", 4, 3), ("more", 7, 3), ("other", 4, 4)):
        make_synthetic(tmp_path / name, train, 2, seed=seed)
    a, b, more, other = (files_of(tmp_path / n) for n in ("a", "b", "more", "other"))
    assert a == b
    images = [name for name in a if name.endswith(".jpg")]
    assert sorted(images) == [f"train/{i:06d}.jpg" for i in range(4)] + [
        f"val/{i:06d}.jpg" for i in range(2)
    ]
    assert all(a[name] == more[name] for name in images)
    assert all(a[name] != other[name] for name in images)
    assert a["train/000000.jpg"] != a["val/000000.jpg"]
    few, many = (json.loads(x["train.json"])["annotations"] for x in (a, more))
    assert few == many[: len(few)]


def test_is_a_coco_data_set(tmp_path, cfg):
    make_synthetic(tmp_path, 20, 4)
    cfg.DATASETS.COCO_FORMAT = [
        [f"shapes_{s}", str(tmp_path / f"{s}.json"), str(tmp_path / s)] for s in ("train", "val")
    ]
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("shapes_train",), ("shapes_val",)
    register_datasets(cfg)
    for image in json.loads((tmp_path / "train.json").read_text())["images"]:
        pixels = cv2.imread(str(tmp_path / "train" / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3)


def test_statistics():
    options = SyntheticOptions()
    drawn = [draw_image(options, "train", i) for i in range(150)]
    counts = Counter(len(objects) for _, objects in drawn)
    assert 0 < counts[0] < 15 and max(counts) == 6
    objects = [(image, o) for image, each in drawn for o in each]
    assert set(Counter(o.class_index for _, o in objects)) == set(range(len(CLASSES)))
    sizes = Counter()
    for image, o in objects:
        height, width = image.shape[:2]
        x0, y0, x1, y1 = o.box
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
        area = (x1 - x0) * (y1 - y0)
        sizes["small" if area < 32**2 else "medium" if area < 96**2 else "large"] += 1
    assert min(sizes.values()) > 0.05 * len(objects) and len(sizes) == 3
    assert all(160 <= side <= 224 for image, _ in drawn for side in image.shape[:2])


@pytest.mark.parametrize("name", CLASSES)
def test_boxes_are_tight(name):
    rng = np.random.default_rng(0)
    for _ in range(20):
        contours = _place(rng, name, 200, 180)
        coverage, window, box = _coverage(contours, 200, 180)
        low = contours[0].min(axis=0).clip(0)
        high = contours[0].max(axis=0).clip(max=(180, 200))
        if (contours[0] >= 0).all() and (contours[0] <= (180, 200)).all():
            assert box == pytest.approx((*low, *high), abs=0.3)
        columns = np.flatnonzero(coverage.any(axis=0)) + window[1].start
        rows = np.flatnonzero(coverage.any(axis=1)) + window[0].start
        outer = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        assert outer[0] <= box[0] < outer[0] + 1 and outer[1] <= box[1] < outer[1] + 1
        assert outer[2] - 1 < box[2] <= outer[2] and outer[3] - 1 < box[3] <= outer[3]


def test_objects_stand_out_from_what_surrounds_them():
    """The pixels inside a shape's box are not all of one colour."""
    for index in range(30):
        image, objects = draw_image(SyntheticOptions(seed=1), "val", index)
        for o in objects:
            x0, y0, x1, y1 = (int(v) for v in o.box)
            assert image[y0:y1, x0:x1].std(axis=(0, 1)).max() > 8


def test_small_images():
    for index in range(20):
        image, objects = draw_image(SyntheticOptions(min_size=32, max_size=40), "train", index)
        assert all(o.box[2] <= image.shape[1] and o.box[3] <= image.shape[0] for o in objects)


def test_what_is_there_is_reused(tmp_path):
    make_synthetic(tmp_path, 3, 2)
    image = tmp_path / "train" / "000001.jpg"
    made = image.stat().st_mtime_ns
    make_synthetic(tmp_path, 3, 2)
    assert image.stat().st_mtime_ns == made
    image.unlink()
    make_synthetic(tmp_path, 3, 2)
    assert image.exists()
    make_synthetic(tmp_path, 5, 2)
    assert len(json.loads((tmp_path / "train.json").read_text())["images"]) == 5


def test_foreign_files_are_left_alone(tmp_path):
    foreign = tmp_path / "train.json"
    for text in ('{"images": []}', "[]", "no JSON"):
        foreign.write_text(text)
        with pytest.raises(UserError, match="is not a synthetic data set.*another output folder"):
            make_synthetic(tmp_path, 3, 2)
        assert foreign.read_text() == text
        assert list(tmp_path.iterdir()) == [foreign]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--train", "-1"], "-1 train images"),
        (["--seed", "-3"], "seed -3 is negative"),
        (["--size", "200", "100"], "image sizes from 200 to 100"),
        (["--size", "8", "100"], "32 <= minimum"),
        (["--max-objects", "0"], "at most 0 objects"),
    ],
)
def test_bad_arguments(tmp_path, capsys, arguments, expected):
    with pytest.raises(SystemExit) as stopped:
        main(["--output", str(tmp_path / "out"), *arguments])
    assert stopped.value.code == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the synthetic data set"):
        make_synthetic(tmp_path / "file", 1, 1)


def test_program(tmp_path, capsys):
    main(["--output", str(tmp_path), "--train", "2", "--val", "0", "--size", "64", "64"])
    assert str(tmp_path) in capsys.readouterr().out
    assert (tmp_path / "train.json").exists() and not (tmp_path / "val.json").exists()
