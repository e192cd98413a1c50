"""Lengths after a resize, by the rule of DETR and by Detectron2's."""

from ddetr_d2.data import DetrDatasetMapper, build_augmentation
from ddetr_d2.data.augmentation import RESIZE_RULES, resized_shape
from ddetr_d2.errors import UserError

import numpy as np
import pytest
from detectron2.data import transforms as T
from transformers.image_transforms import get_resize_output_image_size as shortest_to


@pytest.mark.parametrize(
    "width, height, detr, detectron2",
    [
        (640, 480, (1066, 800), (1067, 800)),
        (480, 640, (800, 1066), (800, 1067)),
        (640, 427, (1199, 800), (1199, 800)),
        (640, 200, (1334, 417), (1333, 417)),  # beyond the limit
        (200, 640, (417, 1334), (417, 1333)),
        (800, 800, (800, 800), (800, 800)),
        (1333, 800, (1333, 800), (1333, 800)),
        (4000, 1, (1333, 1), (1333, 1)),  # a strip
        (2000, 1, (2000, 1), (1333, 1)),  # 0.67 pixels wide become one
    ],
)
def test_examples(width, height, detr, detectron2):
    assert resized_shape(height, width, 800, 1333, "detr") == detr[::-1]
    assert resized_shape(height, width, 800, 1333, "detectron2") == detectron2[::-1]


def test_other_implementations():
    """The truncating resize of transformers, which has no limit, and Detectron2's own."""
    generator = np.random.default_rng(0)
    for height, width, shortest in generator.integers(1, 2000, (500, 3)).tolist():
        image = np.zeros((1, height, width), dtype=np.uint8)
        expected = shortest_to(image, shortest, default_to_square=False)
        assert resized_shape(height, width, shortest, 10**9, "detr") == expected
        expected = T.ResizeShortestEdge.get_output_shape(height, width, shortest, 1333)
        expected = tuple(max(length, 1) for length in expected)
        assert resized_shape(height, width, shortest, 1333, "detectron2") == expected


@pytest.mark.parametrize("rule", RESIZE_RULES)
@pytest.mark.parametrize("is_train", [True, False])
def test_every_resize_follows_the_rule(cfg, is_train, rule):
    cfg.INPUT.RESIZE_RULE = rule
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = "absolute_range", [384, 600]
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (480, 608, 800), 1333
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 800, 1333
    augmentation = T.AugmentationList(build_augmentation(cfg, is_train))
    resizes = set()
    np.random.seed(0)
    for _ in range(40):
        sample = T.AugInput(np.zeros((480, 643, 3), dtype=np.uint8))
        for transform in augmentation(sample).transforms:
            if isinstance(transform, T.ResizeTransform):
                before, after = (transform.h, transform.w), (transform.new_h, transform.new_w)
                limit = 6000 if min(after) in (400, 500, 600) else 1333
                assert after == resized_shape(*before, min(after), limit, rule)
                resizes.add((before, after))
    # Those of whole images, which are the same every time.
    widths = {after[1] for before, after in resizes if before == (480, 643)}
    exact = [643 * size / 480 for size in ((400, 480, 500, 600, 608, 800) if is_train else (800,))]
    assert widths == {int(width) if rule == "detr" else int(width + 0.5) for width in exact}


def test_shortest_sides_are_drawn_from_a_range_too(cfg):
    cfg.INPUT.RESIZE_RULE = "detr"
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = (50, 53), "range"
    (resize,) = build_augmentation(cfg, True)
    image = np.zeros((100, 100), dtype=np.uint8)
    assert {resize.get_transform(image).new_h for _ in range(100)} == {50, 51, 52, 53}
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = (0,), "choice"
    (resize,) = build_augmentation(cfg, True)
    assert resize.get_transform(image).apply_image(image).shape == (100, 100)


@pytest.mark.parametrize("is_train", [True, False])
def test_unknown_rule(cfg, is_train):
    cfg.INPUT.RESIZE_RULE = "round"
    with pytest.raises(UserError, match="INPUT.RESIZE_RULE is 'round': one of detr, detectron2"):
        DetrDatasetMapper(cfg, is_train)
