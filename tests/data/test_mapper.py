"""Augmentation and the way from a record to the model's input."""

import gc
import io

from ddetr_d2.data import DetrDatasetMapper, build_augmentation, register_datasets
from ddetr_d2.errors import UserError, exit_on_user_error

import numpy as np
import pytest
import torch
from detectron2.data import (
    DatasetCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image


@pytest.fixture
def cfg(cfg):
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TRAIN = (48, 64, 80)
    cfg.INPUT.MAX_SIZE_TRAIN = 133
    cfg.INPUT.MIN_SIZE_TEST = 80
    cfg.INPUT.MAX_SIZE_TEST = 133
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE = "absolute_range"
    cfg.INPUT.CROP.SIZE = [38, 60]
    cfg.INPUT.CROP.MIN_SIZE_TRAIN = (40, 50, 60)
    return cfg


@pytest.fixture
def use(cfg, coco):
    """Registers the small data set for training and testing."""
    cfg.DATASETS.COCO_FORMAT = [coco.entry("pets")]
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("pets",)
    register_datasets(cfg)


def record_of(tmp_path, width, height, boxes=()):
    path = tmp_path / f"{width}x{height}.png"
    Image.new("RGB", (width, height), "red").save(path)
    annotations = [
        {"bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0}
        for box in boxes
    ]
    return {
        "file_name": str(path),
        "width": width,
        "height": height,
        "image_id": 1,
        "annotations": annotations,
    }


def test_training_sizes(cfg):
    """Half without a crop, at one of the shortest sides; half cropped; half flipped."""
    augmentation = T.AugmentationList(build_augmentation(cfg, True))
    np.random.seed(0)
    cropped = flipped = 0
    for _ in range(400):
        sample = T.AugInput(np.zeros((60, 80, 3), dtype=np.uint8))
        transforms = augmentation(sample)
        height, width = sample.image.shape[:2]
        assert min(height, width) in cfg.INPUT.MIN_SIZE_TRAIN or max(height, width) == 133
        kinds = [type(t).__name__ for t in transforms.transforms]
        flipped += "HFlipTransform" in kinds
        for t in transforms.transforms:
            if isinstance(t, T.CropTransform):
                cropped += 1
                assert 38 <= t.w <= 60 and 38 <= t.h <= 60
                assert kinds[:1] != ["CropTransform"]  # a resize comes first
    assert 160 < cropped < 240
    assert 160 < flipped < 240


def test_without_crop_and_flip(cfg):
    cfg.INPUT.CROP.ENABLED = False
    cfg.INPUT.RANDOM_FLIP = "none"
    (resize,) = build_augmentation(cfg, True)
    assert isinstance(resize, T.ResizeShortestEdge)
    cfg.INPUT.RANDOM_FLIP = "vertical"
    flip, _ = build_augmentation(cfg, True)
    assert flip.vertical and not flip.horizontal
    cfg.INPUT.RANDOM_FLIP = "diagonal"
    with pytest.raises(UserError, match="INPUT.RANDOM_FLIP is 'diagonal': one of horizontal"):
        build_augmentation(cfg, True)


def test_testing_only_resizes(cfg, tmp_path):
    out = DetrDatasetMapper(cfg, False)(record_of(tmp_path, 60, 40, [(0, 0, 10, 10)]))
    assert out["image"].shape == (3, 80, 120) and out["image"].dtype == torch.uint8
    assert (out["height"], out["width"]) == (40, 60)
    assert "annotations" not in out and "instances" not in out
    out = DetrDatasetMapper(cfg, False)(record_of(tmp_path, 160, 40))
    assert out["image"].shape == (3, 33, 133)


def test_boxes_follow_the_image(cfg, tmp_path):
    """A white rectangle stays in its box whatever the augmentation does."""
    record = record_of(tmp_path, 120, 90, [(30, 20, 60, 40)])
    pixels = np.zeros((90, 120, 3), dtype=np.uint8)
    pixels[20:60, 30:90] = 255
    Image.fromarray(pixels).save(record["file_name"])
    mapper = DetrDatasetMapper(cfg, True)
    np.random.seed(1)
    for _ in range(50):
        out = mapper(record)
        white = (out["image"][0] > 127).nonzero()
        (box,) = out["instances"].gt_boxes.tensor.tolist()
        y0, x0 = white.min(dim=0).values.tolist()
        y1, x1 = (white.max(dim=0).values + 1).tolist()
        assert box == pytest.approx([x0, y0, x1, y1], abs=1.01)
    assert len(record["annotations"]) == 1  # the caller's record is left as it was


@pytest.mark.parametrize(
    "size", [(1, 400), (400, 1), (1, 4000), (4000, 1), (1, 1), (3, 2), (2000, 5)]
)
@pytest.mark.parametrize("is_train", [True, False])
def test_strips_survive(cfg, tmp_path, size, is_train):
    cfg.INPUT.MIN_SIZE_TRAIN = (480, 800)
    cfg.INPUT.CROP.MIN_SIZE_TRAIN = (400, 600)
    cfg.INPUT.CROP.SIZE = [384, 600]
    cfg.INPUT.MAX_SIZE_TRAIN = cfg.INPUT.MAX_SIZE_TEST = 1333
    mapper = DetrDatasetMapper(cfg, is_train)
    for _ in range(10):
        out = mapper(record_of(tmp_path, *size, [(0, 0, *size)]))
        assert min(out["image"].shape) >= 1 and max(out["image"].shape) <= 1333


def test_image_without_boxes(cfg, tmp_path):
    instances = DetrDatasetMapper(cfg, True)(record_of(tmp_path, 60, 40))["instances"]
    assert len(instances) == 0
    assert instances.gt_boxes.tensor.shape == (0, 4)
    assert instances.gt_classes.dtype == torch.int64


def test_cropped_away_and_clipped_boxes(cfg, tmp_path):
    mapper = DetrDatasetMapper(cfg, True)
    counts = set()
    np.random.seed(0)
    for _ in range(60):
        out = mapper(record_of(tmp_path, 160, 160, [(0, 0, 8, 8), (140, 140, 500, 500)]))
        height, width = out["image"].shape[1:]
        boxes = out["instances"].gt_boxes
        counts.add(len(boxes))
        assert boxes.nonempty().all()
        assert boxes.inside_box((height, width), boundary_threshold=1).all()
    assert counts == {0, 1, 2}


def test_crowds_are_not_trained_on(cfg, tmp_path):
    cfg.INPUT.CROP.ENABLED = False
    record = record_of(tmp_path, 60, 40, [(0, 0, 10, 10), (5, 5, 20, 20)])
    record["annotations"][1]["iscrowd"] = 1
    assert len(DetrDatasetMapper(cfg, True)(record)["instances"]) == 1


@pytest.mark.usefixtures("use")
def test_loaders(cfg):
    cfg.SOLVER.IMS_PER_BATCH = 2
    batch = next(iter(build_detection_train_loader(cfg, mapper=DetrDatasetMapper(cfg, True))))
    assert len(batch) == 2 and all(len(x["image"]) == 3 for x in batch)
    tested = list(build_detection_test_loader(cfg, "pets", mapper=DetrDatasetMapper(cfg, False)))
    assert [x["image_id"] for (x,) in tested] == [1, 2, 3]
    seen = {len(DetrDatasetMapper(cfg, True)(r)["instances"]) for r in DatasetCatalog.get("pets")}
    assert 0 in seen  # the image without boxes is kept


@pytest.mark.usefixtures("use")
@pytest.mark.parametrize(
    ("damage", "workers"), [("cut short", 0), ("missing", 0), ("other size", 0), ("missing", 1)]
)
def test_damage_found_while_loading_is_one_line(cfg, coco, capsys, monkeypatch, damage, workers):
    path = coco.images / "a.png"
    if damage == "missing":
        path.unlink()
        expected = f"image file {path} does not exist"
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:500])
        expected = f"image file {path} is cut short or damaged"
    else:
        stream = io.BytesIO()
        Image.new("RGB", (7, 5)).save(stream, "png")
        path.write_bytes(stream.getvalue())
        expected = f"image file {path} has 7 x 5 pixels"
    cfg.DATALOADER.NUM_WORKERS = workers
    # PyTorch waits that long for a worker whose results nobody fetches any more.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)
    loader = build_detection_test_loader(cfg, "pets", mapper=DetrDatasetMapper(cfg, False))
    with pytest.raises(SystemExit) as stopped, exit_on_user_error():
        list(loader)
    assert stopped.value.code == 2
    del stopped
    gc.collect()
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: {expected}")
    assert "\n" not in error
