"""Activation checkpointing: less memory in training, for the time of another forward pass."""

from collections.abc import Callable
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling.backbone.resnet import ResNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError, nearest

PARTS = ("backbone", "encoder", "decoder")


def checkpointed_parts(cfg: CfgNode) -> set[str]:
    """The parts of the model that MODEL.ACTIVATION_CHECKPOINT names.

    Raises:
        UserError: there is no such part.
    """
    parts = set(cfg.MODEL.ACTIVATION_CHECKPOINT)
    for part in sorted(parts.difference(PARTS)):
        raise UserError(
            f"MODEL.ACTIVATION_CHECKPOINT names {part!r}{nearest(part, PARTS)}; there are "
            f"{', '.join(PARTS)}."
        )
    return parts


def run_checkpointed(enabled: bool, layer: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Call a layer. If ``enabled``, autograd keeps its inputs alone, and the backward pass calls it
    once more, with the same random numbers."""
    if enabled and torch.is_grad_enabled():
        return checkpoint(layer, *inputs, use_reentrant=False)
    return layer(*inputs)


class CheckpointedStage(nn.Sequential):
    """Blocks of a backbone, each by :func:`run_checkpointed`."""

    def forward(self, x: Tensor) -> Tensor:
        """From one block to the next."""
        for block in self:
            x = run_checkpointed(self.training, block, x)
        return x


def checkpoint_backbone(backbone: nn.Module) -> None:
    """Make the stages of a ResNet :class:`CheckpointedStage`; names in the state stay.

    Raises:
        UserError: it is not a ResNet, or one whose batch normalisation would count each batch
            twice.
    """
    setting = 'MODEL.ACTIVATION_CHECKPOINT has "backbone"'
    if not isinstance(backbone, ResNet):
        raise UserError(f"{setting}, which is for ResNets, not for {type(backbone).__name__}.")
    modules = [module for stage in backbone.stages for module in stage.modules()]
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules):
        raise UserError(
            f"{setting}, but batch normalisation that is trained would count each batch twice; "
            'MODEL.RESNETS.NORM "FrozenBN" or "GN" goes with it.'
        )
    for index, name in enumerate(backbone.stage_names):
        stage = CheckpointedStage(*backbone.stages[index])
        backbone.stages[index] = stage
        setattr(backbone, name, stage)
