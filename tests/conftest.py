"""Tiny synthetic data and a tiny model for tests of the whole."""

import functools
import importlib.util
from pathlib import Path

from ddetr_d2.data import datasets
from ddetr_d2.data.synthetic import make_synthetic

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from .programs import run_program

ROOT = Path(__file__).parent.parent
VARIANTS = [
    "deformable_detr",
    "deformable_detr_refine",
    "deformable_detr_refine_two_stage",
    "deformable_detr_single_scale",
    "deformable_detr_single_scale_dc5",
]
# The whole family.
MEMBERS = [*VARIANTS, "detr", "detr_dc5_plus"]

# Overrides that make any of the configurations small and quick on a CPU.
TINY = [
    *("MODEL.DEVICE", "cpu"),
    *("MODEL.WEIGHTS", ""),
    *("MODEL.BACKBONE.FREEZE_AT", "0"),
    *("MODEL.RESNETS.NORM", "BN"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "16"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "32"),
    *("MODEL.RESNETS.WIDTH_PER_GROUP", "8"),
    *("MODEL.DEFORMABLE_DETR.HIDDEN_DIM", "64"),
    *("MODEL.DEFORMABLE_DETR.DIM_FEEDFORWARD", "128"),
    *("MODEL.DEFORMABLE_DETR.ENC_LAYERS", "1"),
    *("MODEL.DEFORMABLE_DETR.DEC_LAYERS", "2"),
    *("MODEL.DEFORMABLE_DETR.NUM_QUERIES", "20"),
    *("INPUT.MIN_SIZE_TRAIN", "(96,)"),
    *("INPUT.MIN_SIZE_TEST", "96"),
    *("INPUT.CROP.ENABLED", "False"),
    *("DATALOADER.NUM_WORKERS", "0"),
    *("SOLVER.IMS_PER_BATCH", "2"),
]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory) -> Path:
    """Folder with a synthetic data set of 4 training and 2 validation images."""
    folder = tmp_path_factory.mktemp("shapes")
    make_synthetic(folder, train=4, val=2)
    return folder


@pytest.fixture(scope="session")
def shapes_opts(shapes) -> list[str]:
    """Options that train and evaluate on :func:`shapes`."""
    declared = [[f"tiny_{s}", str(shapes / f"{s}.json"), str(shapes / s)] for s in ("train", "val")]
    return [
        *("DATASETS.COCO_FORMAT", repr(declared)),
        *("DATASETS.TRAIN", "('tiny_train',)"),
        *("DATASETS.TEST", "('tiny_val',)"),
    ]


@pytest.fixture(scope="session")
def train_net():
    """Run train_net.py with the given arguments; returns the finished process with its output."""
    return functools.partial(run_program, ROOT / "train_net.py")


@pytest.fixture(scope="session")
def replay_step():
    """Main function of tools/replay_step.py."""
    spec = importlib.util.spec_from_file_location("replay_step", ROOT / "tools" / "replay_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture
def clean_catalogs():
    """Data sets that a test registers are gone after it."""
    functions, metadata = dict(DatasetCatalog.data), set(MetadataCatalog.data)
    declared, read = dict(datasets._declared), dict(datasets._read)
    yield
    for current, before in (
        (datasets._declared, declared),
        (datasets._read, read),
        (DatasetCatalog.data, functions),
    ):
        current.clear()
        current.update(before)
    for name in set(MetadataCatalog.data) - metadata:
        MetadataCatalog.remove(name)
