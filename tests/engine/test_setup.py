"""Mistakes in configuration files and options: one message each."""

from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError

import pytest
from detectron2.modeling import build_model

from ..conftest import ROOT, TINY

CONFIG = str(ROOT / "configs" / "deformable_detr.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("MODEL: 5", "MODEL"),
        ("_BASE_: missing.yaml", "missing.yaml"),
        ("_BASE_: config.yaml", "no Detectron2 configuration"),
        ("MODEL:\n  META_ARCHITECTURE: GeneralizedRCNN", "GeneralizedRCNN"),
        ("SOLVER:\n  BASE_LR: [1]", "BASE_LR"),
        ("DATASETS:\n  TRAIN: b", r"TRAIN is 'b', a list is expected: write TRAIN: \('b',\) in "),
    ],
)
def test_bad_files(content, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        setup_cfg(str(path))


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE is 'gpu'"),
        (["MODEL.WEIGHTS", "x.pth", "--eval-only"], "--eval-only comes too late"),
        (
            ["DATASETS.TRAIN", "b"],
            r"TRAIN is 'b', a list is .*: write DATASETS.TRAIN \"\('b',\)\"$",
        ),
        (["SOLVER.STEPS", "40"], r"STEPS is 40, a list is .*: write SOLVER.STEPS \"\(40,\)\"$"),
        (["MODEL.RESNET.DEPTH", "50"], "did you mean MODEL.RESNETS.DEPTH"),
    ],
)
def test_bad_options(opts, message):
    with pytest.raises(UserError, match=message):
        setup_cfg(CONFIG, opts)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.RESNETS.OUT_FEATURES", "['res5']"], "IN_FEATURES names res3, res4"),
        (["MODEL.DEFORMABLE_DETR.NUM_FEATURE_LEVELS", "2"], "NUM_FEATURE_LEVELS is 2"),
        (["MODEL.DEFORMABLE_DETR.HIDDEN_DIM", "100"], "multiple of 32"),
        (["MODEL.DEFORMABLE_DETR.NUM_HEADS", "7"], "multiple of 7"),
    ],
)
def test_sizes_that_do_not_go_together(opts, message):
    cfg = setup_cfg(CONFIG, [*TINY, "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3", *opts])
    with pytest.raises(UserError, match=message):
        build_model(cfg)
