"""Backbones."""

from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError
from ddetr_d2.modeling.backbone import build_detr_backbone

import pytest
import torch

from ..conftest import ROOT


def build(config, *opts):
    cfg = setup_cfg(str(ROOT / "configs" / f"{config}.yaml"), ["MODEL.DEVICE", "cpu", *opts])
    return build_detr_backbone(cfg)


def test_slim_resnet_has_the_width_asked_for():
    backbone = build("synthetic_demo", "MODEL.RESNETS.RES2_OUT_CHANNELS", "8")
    features = backbone(torch.rand(1, 3, 64, 96))
    assert {name: tuple(x.shape) for name, x in features.items()} == {
        "res3": (1, 16, 8, 12),
        "res4": (1, 32, 4, 6),
    }
    assert not hasattr(backbone, "res5")


def test_dc5_is_dilated_after_the_block_that_lost_its_stride():
    backbone = build("deformable_detr_single_scale_dc5")
    assert [block.conv2.dilation for block in backbone.res5] == [(1, 1), (2, 2), (2, 2)]
    assert backbone.output_shape()["res5"].stride == 16
    with torch.no_grad():
        assert backbone(torch.rand(1, 3, 64, 96))["res5"].shape == (1, 2048, 4, 6)


def test_unknown_backbone_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean build_resnet_backbone"):
        build("deformable_detr", "MODEL.BACKBONE.NAME", "build_resnet_backbon")
