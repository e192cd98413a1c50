"""The two models that tools/benchmark_model.py times, and what each of their inferences gives."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmarking import Run
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import Instances
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torchvision.ops import box_convert

from ddetr_d2.checkpoint.transformers import to_transformers
from ddetr_d2.modeling import prepare_for_inference

# Of scores and of boxes relative to the image.
TOLERANCE = 1e-3


def make_ours(cfg: CfgNode) -> nn.Module:
    """The model of ``cfg``, with random weights that always are the same.

    Sampling points and scores are spread, as they are in a trained model.
    """
    torch.manual_seed(0)
    model = build_model(cfg)
    for name, parameter in model.named_parameters():
        if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
            nn.init.normal_(parameter, std=0.05)
        elif name.endswith("class_embed.weight"):
            nn.init.normal_(parameter, std=0.1)
    return model


def make_theirs(folder: str, device: str) -> nn.Module:
    """The model that :func:`save_for_transformers` has written to ``folder``."""
    from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    config = DeformableDetrConfig.from_pretrained(folder)
    # Weights left on the disk would be read, and counted as memory, by the first inference.
    weights = load(Path(folder, "model.safetensors").read_bytes())
    model = DeformableDetrForObjectDetection.from_pretrained(
        None, config=config, state_dict=weights
    )
    return model.eval().to(device)


def save_for_transformers(model: nn.Module, cfg: CfgNode, folder: str) -> None:
    weights, config = to_transformers(model.state_dict(), cfg)
    save_file(weights, Path(folder, "model.safetensors"), metadata={"format": "pt"})
    Path(folder, "config.json").write_text(json.dumps(config))


def make_images(batch: int, size: Sequence[int]) -> list[Tensor]:
    """``batch`` images (3, H, W) of uint8."""
    generator = torch.Generator().manual_seed(2)
    shape = (3, *size)
    return [torch.randint(256, shape, generator=generator, dtype=torch.uint8) for _ in range(batch)]


def run_ours(model: nn.Module, images: Sequence[Tensor]) -> list[Instances]:
    """Detections, as the demo asks for them of a model made by ``prepare_for_inference``."""
    with torch.inference_mode():
        return [x["instances"] for x in model([{"image": image} for image in images])]


def normalised(cfg: CfgNode, images: Sequence[Tensor]) -> Tensor:
    """What transformers' image processor makes of the images, on the device: (N, 3, H, W)."""
    tensor = torch.stack(list(images)).to(cfg.MODEL.DEVICE)
    mean, std = (
        tensor.new_tensor(x, dtype=torch.float32)
        for x in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )
    tensor = (tensor - mean[:, None, None]) / std[:, None, None]
    return tensor.flip(1) if cfg.INPUT.FORMAT == "BGR" else tensor


def run_theirs(model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, Q, classes) and boxes (N, Q, 4) as transformers gives them."""
    with torch.inference_mode():
        output = model(pixels)
    return output.logits, output.pred_boxes


def difference(ours: Instances, logits: Tensor, boxes: Tensor) -> float:
    """Largest difference of a score, or of a box relative to the image, for one image.

    Args:
        ours: detections here.
        logits: (Q, classes) there.
        boxes: (Q, 4) there, relative (cx, cy, w, h).
    """
    scores = logits.sigmoid()
    best = scores.flatten().topk(len(ours)).values
    height, width = ours.image_size
    scale = boxes.new_tensor([width, height, width, height])
    there = box_convert(boxes, "cxcywh", "xyxy")[ours.queries]
    differences = (
        ours.scores - best,
        ours.scores - scores[ours.queries, ours.pred_classes],
        ours.pred_boxes.tensor / scale - there,
    )
    return torch.stack([x.abs().max() for x in differences]).max().item()


def compare(cfg: CfgNode, ours: nn.Module, theirs: nn.Module, size: Sequence[int]) -> float:
    """Difference of the detections on one image.

    Raises:
        RuntimeError: if it is above the tolerance.
    """
    images = make_images(1, size)
    logits, boxes = run_theirs(theirs, normalised(cfg, images))
    found = difference(run_ours(ours, images)[0], logits[0], boxes[0])
    if not found <= TOLERANCE:
        raise RuntimeError(f"the models differ by {found:.2g}, where {TOLERANCE} is the limit")
    return found


def prepare_ours(cfg: CfgNode, size: Sequence[int]) -> Run:
    """Two inferences of this project's model: what is kept for the second one counts as well."""
    model, images = prepare_for_inference(make_ours(cfg)), make_images(1, size)
    return lambda: [run_ours(model, images) for _ in range(2)]


def prepare_theirs(cfg: CfgNode, size: Sequence[int], folder: str) -> Run:
    """The same of transformers' model."""
    model = make_theirs(folder, cfg.MODEL.DEVICE)
    pixels = normalised(cfg, make_images(1, size))
    return lambda: [run_theirs(model, pixels) for _ in range(2)]
