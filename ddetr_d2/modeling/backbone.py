"""Detectron2's backbones, as Deformable DETR uses them, and one more."""

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_backbone
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, ResNet

from ..errors import UserError, nearest
from ..layers.deform_conv import provide_deform_conv
from . import timm_backbone  # noqa: F401  build_timm_backbone
from .checkpointing import checkpoint_backbone, checkpointed_parts
from .frozen_norm import scale_weights_by_frozen_norms

STAGES = ("res2", "res3", "res4", "res5")


def build_detr_backbone(cfg: CfgNode) -> Backbone:
    """Build the backbone that ``cfg`` names.

    With ``MODEL.RESNETS.RES5_DILATION`` 2 (DC5) the first block of the last stage, which lost its
    stride, is not dilated yet, as in torchvision's ResNets; Detectron2's own would be.

    Raises:
        UserError: there is no backbone of that name, or MODEL.ACTIVATION_CHECKPOINT is wrong.
    """
    if cfg.MODEL.BACKBONE.NAME not in BACKBONE_REGISTRY:
        hint = nearest(cfg.MODEL.BACKBONE.NAME, [name for name, _ in BACKBONE_REGISTRY])
        raise UserError(f"MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME!r} is unknown{hint}.")
    provide_deform_conv()
    backbone = build_backbone(cfg)
    if isinstance(backbone, ResNet) and cfg.MODEL.RESNETS.RES5_DILATION == 2:
        block = backbone.res5[0]
        for name in ("conv2", "conv2_offset"):
            if hasattr(block, name):
                getattr(block, name).dilation = getattr(block, name).padding = (1, 1)
    scale_weights_by_frozen_norms(backbone)
    if "backbone" in checkpointed_parts(cfg):
        checkpoint_backbone(backbone)
    return backbone


@BACKBONE_REGISTRY.register()
def build_slim_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """ResNet-18 of any width, for small models that train on a CPU.

    Detectron2's builder fixes the width of its ResNet-18 at 64; here it is
    ``MODEL.RESNETS.RES2_OUT_CHANNELS``. Stages after the last of ``OUT_FEATURES`` are left out.
    """
    node = cfg.MODEL.RESNETS
    stem = BasicStem(input_shape.channels, node.STEM_OUT_CHANNELS, node.NORM)
    stages, channels = [], node.STEM_OUT_CHANNELS
    for index in range(1 + max(STAGES.index(name) for name in node.OUT_FEATURES)):
        out_channels = node.RES2_OUT_CHANNELS * 2**index
        stages.append(
            ResNet.make_stage(
                BasicBlock,
                num_blocks=2,
                stride_per_block=[1 if index == 0 else 2, 1],
                in_channels=channels,
                out_channels=out_channels,
                norm=node.NORM,
            )
        )
        channels = out_channels
    resnet = ResNet(stem, stages, out_features=node.OUT_FEATURES)
    return resnet.freeze(cfg.MODEL.BACKBONE.FREEZE_AT)
