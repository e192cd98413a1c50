from ddetr_d2.layers.deform_conv import DeformConv, ModulatedDeformConv, provide_deform_conv

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import resnet
from torch.nn import functional as F


def offsets(n, groups, h, w, y=0.0, x=0.0):
    pair = torch.tensor([y, x]).repeat(groups * 9)
    return pair[None, :, None, None].expand(n, -1, h, w)


@pytest.mark.parametrize(
    "stride, dilation, groups, deformable_groups", [(1, 1, 1, 1), (2, 2, 2, 2)]
)
def test_zero_offsets_are_an_ordinary_convolution(stride, dilation, groups, deformable_groups):
    torch.manual_seed(0)
    conv = ModulatedDeformConv(
        4,
        6,
        kernel_size=3,
        stride=stride,
        padding=dilation,
        dilation=dilation,
        groups=groups,
        deformable_groups=deformable_groups,
        norm=torch.nn.BatchNorm2d(6),
        activation=F.relu,
    )
    x = torch.randn(2, 4, 9, 8)
    plain = F.conv2d(x, conv.weight, conv.bias, stride, dilation, dilation, groups)
    offset = offsets(2, deformable_groups, *plain.shape[-2:])
    mask = torch.ones(2, deformable_groups * 9, *plain.shape[-2:])
    torch.testing.assert_close(conv(x, offset, mask), F.relu(conv.norm(plain)))


def test_offsets_are_pairs_of_y_and_x():
    conv = DeformConv(1, 1, kernel_size=3, padding=1)
    x = torch.randn(1, 1, 6, 7)
    shifted = F.pad(x, (0, 2, 0, 1))[:, :, 1:, 2:]  # one row up, two columns left
    out = conv(x, offsets(1, 1, 6, 7, y=1.0, x=2.0))
    expected = F.conv2d(shifted, conv.weight, padding=1)
    # At the first row and column the shifted image is padded where x has pixels.
    torch.testing.assert_close(out[..., 1:, 1:], expected[..., 1:, 1:])


def test_mask_scales_samples():
    conv = ModulatedDeformConv(2, 3, kernel_size=3, padding=1, bias=False)
    x, offset = torch.randn(1, 2, 5, 5), torch.randn(1, 18, 5, 5)
    half = torch.full((1, 9, 5, 5), 0.5)
    torch.testing.assert_close(conv(x, offset, half), conv(x, offset) / 2)


def test_empty_batch():
    conv = DeformConv(2, 3, kernel_size=3, padding=1)
    assert conv(torch.zeros(0, 2, 5, 5), torch.zeros(0, 18, 5, 5)).shape == (0, 3, 5, 5)


@pytest.mark.parametrize("modulated", [False, True])
def test_resnext_backbone_trains(modulated):
    provide_deform_conv()
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.OUT_FEATURES = ["res5"]
    cfg.MODEL.RESNETS.NUM_GROUPS = 2
    cfg.MODEL.RESNETS.WIDTH_PER_GROUP = 4
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 16
    cfg.MODEL.RESNETS.STEM_OUT_CHANNELS = 8
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE = [False, True, True, True]
    cfg.MODEL.RESNETS.DEFORM_MODULATED = modulated
    cfg.MODEL.RESNETS.DEFORM_NUM_GROUPS = 2
    model = resnet.build_resnet_backbone(cfg, ShapeSpec(channels=3))

    out = model(torch.randn(1, 3, 40, 50))["res5"]
    assert out.shape == (1, 128, 2, 2)
    out.sum().backward()

    parameters = dict(model.named_parameters())
    # Detectron2's names, so that its checkpoints fit.
    assert "res3.0.conv2_offset.weight" in parameters
    assert parameters["res3.0.conv2.weight"].shape == (16, 8, 3, 3)
    assert "res3.0.conv2.norm.weight" in model.state_dict()
    assert parameters["res3.0.conv2_offset.weight"].grad.abs().sum() > 0
