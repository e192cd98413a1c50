"""What an exported file says of itself, and that the demo goes by it."""

import importlib.util

from ddetr_d2.data.augmentation import RESIZE_RULES, resized_shape
from ddetr_d2.engine import setup_cfg
from ddetr_d2.export import ExportableDetector, describe, example_inputs

import numpy as np
import pytest
import torch

from ..conftest import ROOT, TINY

SPEC = importlib.util.spec_from_file_location("onnx_demo", ROOT / "demo" / "onnx_demo.py")
onnx_demo = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(onnx_demo)


def describe_export(build, *opts):
    variant = "deformable_detr_single_scale"
    cfg = setup_cfg(str(ROOT / "configs" / f"{variant}.yaml"), [*TINY, *opts])
    return describe(ExportableDetector(build(variant)), cfg, ["cat", "dog", "bird"])


def test_rule_of_the_resize(build):
    assert describe_export(build)["resize_rule"] == "detr"
    opts = ("INPUT.RESIZE_RULE", "detectron2")
    assert describe_export(build, *opts)["resize_rule"] == "detectron2"


@pytest.mark.parametrize(
    "variant, activation",
    [("deformable_detr", "sigmoid"), ("detr", "softmax"), ("detr_dc5_plus", "sigmoid")],
)
def test_what_makes_scores_of_logits(variant, activation, build):
    """With it, a program that gets logits finds the scores that the model gives."""
    model = build(variant)
    cfg = setup_cfg(str(ROOT / "configs" / f"{variant}.yaml"), TINY)
    assert describe(ExportableDetector(model), cfg, None)["activation"] == activation
    raw, whole = ExportableDetector(model, postprocess=False), ExportableDetector(model)
    inputs = example_inputs(whole, (70, 66))
    with torch.no_grad():
        logits, _ = raw(*inputs[:2])
        scores, *_ = whole(*inputs)
    if activation == "softmax":
        expected = logits.softmax(-1)[..., :-1].amax(-1)
    else:
        expected = logits.sigmoid().flatten(1)
    torch.testing.assert_close(scores[:, 0], expected.amax(-1))


@pytest.mark.parametrize("rule", RESIZE_RULES)
def test_the_demo_resizes_as_evaluation_does(rule):
    metadata = {"shortest_side": 800, "longest_side": 1333, "resize_rule": rule}
    assert (
        onnx_demo.resized_shape(480, 640, metadata)[1] == {"detr": 1066, "detectron2": 1067}[rule]
    )
    sizes = [*np.random.default_rng(0).integers(1, 3000, (2000, 2)).tolist(), [1, 4000], [2000, 1]]
    for size in sizes:
        expected = resized_shape(*size, 800, 1333, rule)
        assert onnx_demo.resized_shape(*size, metadata) == expected, size


def test_files_from_before_the_rule_are_resized_by_detectron2s():
    metadata = {"shortest_side": 800, "longest_side": 1333}
    assert onnx_demo.resized_shape(480, 640, metadata) == (800, 1067)
