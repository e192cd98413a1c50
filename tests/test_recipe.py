"""What the configurations choose, where the recipe of the paper and Detectron2's habits differ."""

import pytest
from detectron2.config import CfgNode

from ddetr_d2.engine import setup_cfg

from .conftest import ROOT

COCO_IMAGES = 118_287
SMALL = ("synthetic_demo", "bccd")
COCO = sorted(
    path.stem
    for path in (ROOT / "configs").glob("*.yaml")
    if path.stem not in SMALL and not path.stem.startswith("Base")
)


def load(name: str) -> CfgNode:
    return setup_cfg(str(ROOT / "configs" / f"{name}.yaml"), ["MODEL.DEVICE", "cpu"])


def choices(cfg: CfgNode) -> dict[str, bool | str]:
    node = cfg.MODEL.DEFORMABLE_DETR
    return {
        "grouped by orientation": cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        "resize": cfg.INPUT.RESIZE_RULE,
        "layers start equal": node.LAYERS_START_EQUAL,
        "heads start equal": node.HEADS_START_EQUAL,
    }


@pytest.mark.parametrize("name", COCO)
def test_coco(name):
    cfg = load(name)
    assert choices(cfg) == {
        "grouped by orientation": False,
        "resize": "detr",
        "layers start equal": True,
        "heads start equal": True,
    }
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.WEIGHT_DECAY) == (32, 2e-4, 1e-4)
    epoch = COCO_IMAGES // solver.IMS_PER_BATCH  # the last incomplete batch is dropped
    assert epoch == 3_696
    assert solver.MAX_ITER == 50 * epoch == 184_800
    assert solver.STEPS == (40 * epoch,) == (147_840,)
    assert solver.CHECKPOINT_PERIOD == epoch
    assert cfg.TEST.EVAL_PERIOD % epoch == 0
    assert (solver.BACKBONE_MULTIPLIER, solver.SAMPLING_MULTIPLIER, solver.GAMMA) == (0.1, 0.1, 0.1)
    assert solver.WARMUP_ITERS == 0
    clip = solver.CLIP_GRADIENTS
    assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE) == (True, "full_model", 0.1)
    assert not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    assert cfg.INPUT.MIN_SIZE_TRAIN == tuple(range(480, 801, 32))
    assert cfg.INPUT.CROP.MIN_SIZE_TRAIN == (400, 500, 600)
    assert cfg.INPUT.CROP.SIZE == [384, 600]
    assert cfg.INPUT.MAX_SIZE_TRAIN == cfg.INPUT.MAX_SIZE_TEST == 1333
    assert cfg.INPUT.MIN_SIZE_TEST == 800


@pytest.mark.parametrize("name", SMALL)
def test_small_models_keep_what_they_were_tuned_with(name):
    assert choices(load(name)) == {
        "grouped by orientation": True,
        "resize": "detectron2",
        "layers start equal": False,
        "heads start equal": False,
    }


def test_a_configuration_without_the_keys_is_as_before_them():
    assert choices(setup_cfg("", ["MODEL.DEVICE", "cpu"])) == choices(load("bccd"))
