"""The same model here and in Hugging Face transformers, and what the two are compared by."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ddetr_d2.checkpoint.transformers import from_transformers, to_transformers
from ddetr_d2.engine import setup_cfg
from ddetr_d2.modeling import SetDetector
from ddetr_d2.modeling.matcher import Target

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.ops import box_convert
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .conftest import ROOT, TINY

CLASSES = 5
# Height and width of the images; the second is padded at the right and the bottom.
SIZES = [(64, 96), (30, 60)]
OPTIONS = [
    *TINY,
    *("MODEL.RESNETS.NORM", "FrozenBN"),
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "64"),
    *("MODEL.DEFORMABLE_DETR.NUM_CLASSES", str(CLASSES)),
    *("MODEL.DEFORMABLE_DETR.NUM_HEADS", "4"),
    # More than the usable tokens of the smaller image.
    *("MODEL.DEFORMABLE_DETR.NUM_QUERIES", "60"),
    *("MODEL.DEFORMABLE_DETR.ENC_POINTS", "2"),
    *("MODEL.DEFORMABLE_DETR.ENC_LAYERS", "2"),
    *("MODEL.DEFORMABLE_DETR.DEC_LAYERS", "3"),
    *("MODEL.DEFORMABLE_DETR.DROPOUT", "0.0"),
]
FULL_WIDTH = [*("MODEL.RESNETS.RES2_OUT_CHANNELS", "256"), *("MODEL.RESNETS.WIDTH_PER_GROUP", "64")]
LOSSES = {"loss_ce": "loss_class", "loss_bbox": "loss_l1", "loss_giou": "loss_giou"}


class Batch(NamedTuple):
    """Normalised and padded images (N, 3, H, W), True on padding (N, H, W), ground truth."""

    images: Tensor
    padding_mask: Tensor
    targets: list[Target]


class Results(NamedTuple):
    """What is compared, by the names used here."""

    predictions: dict[str, Tensor]
    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]


def make_batch(dtype: torch.dtype, seed: int, counts: Sequence[int] = (3, 5)) -> Batch:
    """Random images and ground truth, ``counts`` objects in each image."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (max(size) for size in zip(*SIZES, strict=True))
    images = torch.zeros(len(SIZES), 3, height, width, dtype=dtype)
    padding_mask = torch.ones(len(SIZES), height, width, dtype=torch.bool)
    targets = []
    for index, ((h, w), count) in enumerate(zip(SIZES, counts, strict=True)):
        images[index, :, :h, :w] = torch.randn(3, h, w, generator=generator, dtype=dtype)
        padding_mask[index, :h, :w] = False
        centers, sizes = torch.rand(2, count, 2, generator=generator, dtype=dtype)
        boxes = torch.cat((0.3 + 0.4 * centers, 0.1 + 0.4 * sizes), dim=1)
        targets.append(Target(torch.randint(CLASSES, (count,), generator=generator), boxes))
    return Batch(images, padding_mask, targets)


def make_inputs() -> tuple[list[dict], list[Target]]:
    """Images and ground truth as the detectors here take them; the same ground truth by itself."""
    generator = torch.Generator().manual_seed(0)
    targets = make_batch(torch.float32, 0).targets
    inputs = []
    wanted = [(480, 640), (300, 420)]  # sizes of the output
    for target, (h, w), (height, width) in zip(targets, SIZES, wanted, strict=True):
        boxes = box_convert(target.boxes, "cxcywh", "xyxy") * torch.tensor([w, h, w, h])
        instances = Instances((h, w), gt_boxes=Boxes(boxes), gt_classes=target.labels)
        image = torch.randint(256, (3, h, w), generator=generator).byte()
        inputs.append({"image": image, "instances": instances, "height": height, "width": width})
    return inputs, targets


def as_labels(targets: Sequence[Target]) -> list[dict[str, Tensor]]:
    """Ground truth as transformers takes it."""
    return [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]


def make_pair(
    variant: str,
    made: str,
    folder: Path,
    build_there: Callable[[CfgNode], PreTrainedModel],
    their_class: type[PreTrainedModel],
    seed: int = 0,
) -> tuple[CfgNode, SetDetector, PreTrainedModel]:
    """Both models with the same random weights, made ``"here"`` or ``"there"``.

    Args:
        variant: name of the configuration.
        made: where.
        folder: for the weights of transformers.
        build_there: the model of a configuration as transformers builds it.
        their_class: whose ``from_pretrained`` reads what is made here.
        seed: of the weights.

    Those made here have a backbone of transformers there, or of timm where it is dilated; those
    made there have one of timm.
    """
    dilated_here = made == "here" and variant.endswith("dc5")
    # timm's ResNets by name have their full width.
    options = [*OPTIONS, *FULL_WIDTH] if dilated_here else OPTIONS
    cfg = setup_cfg(str(ROOT / "configs" / f"{variant}.yaml"), options)
    here = build_model(cfg)
    if made == "here":
        randomise(here, seed)
        weights, config = to_transformers(here.state_dict(), cfg)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
        there, report = their_class.from_pretrained(folder, output_loading_info=True)
        assert not any(report.values()), report
    else:
        there = build_there(cfg)
        randomise(there, seed)
        there.save_pretrained(folder)
        here.load_state_dict(from_transformers(load_file(folder / "model.safetensors")))
    # transformers freezes backbones, wholly or in part.
    return cfg, here, there.requires_grad_()


def randomise(model: nn.Module, seed: int) -> None:
    """Give every weight, bias and statistic random values, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not tensor.is_floating_point():
                continue
            if any(tensor is embedding for embedding in embeddings):
                tensor.normal_(generator=generator)
            elif tensor.dim() > 1:
                tensor.normal_(std=1 / math.sqrt(tensor[0].numel()), generator=generator)
            elif name.endswith(("weight", "running_var")):
                tensor.uniform_(0.5, 1.5, generator=generator)
            else:
                tensor.normal_(std=0.3, generator=generator)


def results_here(model: SetDetector, batch: Batch) -> Results:
    layers, proposals = model.predict(batch.images, batch.padding_mask)
    losses = model.criterion(layers, proposals, batch.targets)
    sum(losses.values()).backward()
    predictions = {}
    for name, prediction in [*enumerate(layers), ("proposals", proposals)]:
        if prediction is not None:
            predictions[f"logits of {name}"], predictions[f"boxes of {name}"] = prediction
    return Results(predictions, losses, {n: p.grad for n, p in model.named_parameters()})


def predictions_there(output: ModelOutput) -> dict[str, Tensor]:
    """Predictions of all decoder layers."""
    predictions = {}
    layers = [(x["logits"], x["pred_boxes"]) for x in output.auxiliary_outputs]
    for index, (logits, boxes) in enumerate([*layers, (output.logits, output.pred_boxes)]):
        predictions[f"logits of {index}"], predictions[f"boxes of {index}"] = logits, boxes
    return predictions


def losses_there(terms: dict[str, Tensor], cfg: CfgNode) -> dict[str, Tensor]:
    """The losses of transformers under their names here and with their weights, which only the
    losses here contain."""
    node = cfg.MODEL.DEFORMABLE_DETR
    weights = (node.CLASS_WEIGHT, node.L1_WEIGHT, node.GIOU_WEIGHT)
    losses = {}
    for (theirs, ours), weight in zip(LOSSES.items(), weights, strict=True):
        for name, term in terms.items():
            if name.startswith(theirs):
                losses[name.replace(theirs, ours)] = weight * term
    return losses


def gradients_there(model: PreTrainedModel) -> dict[str, Tensor]:
    """Gradients under the names here; statistics of batch normalisation have zeros.

    Conversion moves and joins values, so that it works on gradients as it does on weights.
    """
    return from_transformers(
        {
            name: torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            for name, tensor in model.state_dict(keep_vars=True).items()
        }
    )


def differences(
    here: dict[str, Tensor], there: dict[str, Tensor], tolerance: float
) -> dict[str, float]:
    """Those above the tolerance, relative to the largest value of a tensor, which is not zero."""
    assert here.keys() == there.keys()
    found = {}
    for name, value in here.items():
        largest = there[name].abs().max()
        assert largest > 0, name
        found[name] = ((value - there[name]).abs().max() / largest).item()
    # NaN is a difference as well.
    return {name: difference for name, difference in found.items() if not difference <= tolerance}
