"""Tiny models and batches for tests of the training step."""

from ddetr_d2.engine import setup_cfg
from ddetr_d2.engine.optimizer import build_clipping, build_optimizer
from ddetr_d2.engine.training_step import TrainingStep

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from ..conftest import ROOT, TINY

# No dropout, and no statistics that one image of a batch gets from the others.
INDEPENDENT = ["MODEL.RESNETS.NORM", "FrozenBN", "MODEL.DEFORMABLE_DETR.DROPOUT", "0.0"]


def build(variant: str = "deformable_detr", *opts: str) -> tuple[CfgNode, nn.Module]:
    """A tiny model of three classes for training, always with the same weights."""
    opts = (*TINY, *INDEPENDENT, "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3", *opts)
    cfg = setup_cfg(str(ROOT / "configs" / f"{variant}.yaml"), opts)
    torch.manual_seed(0)
    return cfg, build_model(cfg).train()


def build_step(cfg: CfgNode, model: nn.Module, **kwargs) -> TrainingStep:
    return TrainingStep(model, build_optimizer(cfg, model), build_clipping(cfg), **kwargs)


def images(*boxes: int, size: int = 64) -> list[dict]:
    """A batch of square images with these numbers of boxes, always the same one."""
    random = torch.Generator().manual_seed(0)
    batch = []
    for number, count in enumerate(boxes):
        instances = Instances((size, size))
        corners = torch.rand(count, 2, generator=random) * 0.6
        sizes = torch.rand(count, 2, generator=random) * 0.3 + 0.1
        instances.gt_boxes = Boxes(torch.cat((corners, corners + sizes), dim=1) * size)
        instances.gt_classes = torch.randint(3, (count,), generator=random)
        image = torch.randint(256, (3, size, size), dtype=torch.uint8, generator=random)
        batch.append({"image": image, "file_name": f"{number}.png", "instances": instances})
    return batch


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all gradients, by name without the prefix of data parallelism."""
    return {
        name.removeprefix("module."): parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def copy_of_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
