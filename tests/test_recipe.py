"""What the configurations choose, where the recipe of the paper and Detectron2's habits differ."""

from ddetr_d2.engine import setup_cfg

import pytest
from detectron2.config import CfgNode

from .conftest import ROOT

COCO_IMAGES = 118_287
SMALL = ("synthetic_demo", "bccd")
DETR = ("detr", "detr_dc5", "detr_dc5_plus")
COCO = sorted(
    path.stem
    for path in (ROOT / "configs").glob("*.yaml")
    if path.stem.startswith("deformable_detr")
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
    check_shared_recipe(cfg)


def check_shared_recipe(cfg: CfgNode) -> None:
    """What Deformable DETR took over from DETR."""
    solver = cfg.SOLVER
    assert (solver.OPTIMIZER, solver.WEIGHT_DECAY, solver.GAMMA) == ("AdamW", 1e-4, 0.1)
    assert solver.BACKBONE_MULTIPLIER == 0.1
    clip = solver.CLIP_GRADIENTS
    assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE) == (True, "full_model", 0.1)
    assert not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    assert cfg.INPUT.MIN_SIZE_TRAIN == tuple(range(480, 801, 32))
    assert cfg.INPUT.CROP.MIN_SIZE_TRAIN == (400, 500, 600)
    assert cfg.INPUT.CROP.SIZE == [384, 600]
    assert cfg.INPUT.MAX_SIZE_TRAIN == cfg.INPUT.MAX_SIZE_TEST == 1333
    assert cfg.INPUT.MIN_SIZE_TEST == 800


@pytest.mark.parametrize("name", DETR)
def test_detr_on_coco(name):
    cfg = load(name)
    assert choices(cfg) == {
        "grouped by orientation": False,
        "resize": "detr",
        "layers start equal": False,
        "heads start equal": False,
    }
    solver, node = cfg.SOLVER, cfg.MODEL.DEFORMABLE_DETR
    assert (solver.IMS_PER_BATCH, solver.BASE_LR) == (64, 1e-4)
    epoch = COCO_IMAGES // solver.IMS_PER_BATCH
    assert epoch == solver.CHECKPOINT_PERIOD == 1_848
    epochs, drop = (50, 40) if name == "detr_dc5_plus" else (500, 400)
    assert (solver.MAX_ITER, solver.STEPS) == (epochs * epoch, (drop * epoch,))
    assert cfg.TEST.EVAL_PERIOD % epoch == 0
    check_shared_recipe(cfg)
    assert cfg.MODEL.RESNETS.RES5_DILATION == (1 if name == "detr" else 2)
    assert (node.HIDDEN_DIM, node.DIM_FEEDFORWARD, node.ENC_LAYERS, node.DEC_LAYERS) == (
        256, 2048, 6, 6,
    )  # fmt: skip
    loss = (node.CLASS_LOSS, node.NUM_QUERIES, node.CLASS_WEIGHT, node.L1_WEIGHT, node.GIOU_WEIGHT)
    if name == "detr_dc5_plus":
        assert loss == ("focal", 300, 2.0, 5.0, 2.0)
    else:
        assert loss == ("cross_entropy", 100, 1.0, 5.0, 2.0)
        assert node.NO_OBJECT_WEIGHT == 0.1


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
