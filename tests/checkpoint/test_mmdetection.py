"""Weights of mmdetection's Deformable DETR, versions 2 and 3."""

from ddetr_d2.checkpoint import DetrCheckpointer, read_class_names
from ddetr_d2.checkpoint.formats import COCO_NAMES

import pytest
import torch

from ..conftest import VARIANTS
from .foreign import as_mmdetection
from .test_formats import assert_same, build, weights_of


@pytest.mark.parametrize("major", [2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_mmdetection(variant, major, tmp_path):
    source = build(variant, 80)
    for projection, _ in source.projection.input_proj:
        torch.nn.init.zeros_(projection.bias)
    features = 1 if "single_scale" in variant else 3
    state = as_mmdetection(source.state_dict(), 1, 2, features, major)
    torch.save({"meta": {"epoch": 50}, "state_dict": state}, tmp_path / "a.pth")
    target = build(variant, 80)
    DetrCheckpointer(target, strict=True).load(str(tmp_path / "a.pth"))
    assert_same(weights_of(target), weights_of(source))
    assert read_class_names(str(tmp_path / "a.pth")) == COCO_NAMES


def test_mmdetection_names_its_classes(tmp_path):
    source = build("deformable_detr", 2)
    state = as_mmdetection(source.state_dict(), 1, 2, 3, 3)
    content = {"meta": {"dataset_meta": {"classes": ("cat", "dog")}}, "state_dict": state}
    torch.save(content, tmp_path / "a.pth")
    assert read_class_names(str(tmp_path / "a.pth")) == ["cat", "dog"]
