"""The backbone that all detectors of a comparison start from: it has learned to classify objects.

The detectors of the papers start from backbones that were trained to classify the pictures of
ImageNet. Small backbones for synthetic images have no such weights, so they are trained here, in
less than a minute, to classify objects cut out of the training images.
"""

import json
import logging
from pathlib import Path

from ddetr_d2.checkpoint.whole_files import save_whole
from ddetr_d2.modeling.backbone import build_detr_backbone

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger(__name__)

CROP = 64  # pixels, side of a cut-out object
_MARGIN = 0.2  # of the box, on each side
_BATCH = 64


def train_backbone(
    cfg: CfgNode, annotation_file: Path, image_folder: Path, output: Path, *, seed: int, steps: int
) -> float:
    """Train the backbone of ``cfg`` to classify objects, and write its weights to ``output``.

    Args:
        cfg: configuration of a detector.
        annotation_file: of the training images, in COCO format.
        image_folder: the images.
        output: a file that MODEL.WEIGHTS can name.
        seed: of the first weights and of the order of the objects.
        steps: batches of 64 objects.

    Returns:
        share of the objects of the last 50 batches that were classified rightly, before each
        batch was learned from.
    """
    images, labels = cut_objects(annotation_file, image_folder)
    torch.manual_seed(seed)
    backbone = build_detr_backbone(cfg)
    feature, shape = list(backbone.output_shape().items())[-1]
    head = nn.Linear(shape.channels, int(labels.max()) + 1)
    mean, std = (
        torch.tensor(x)[:, None, None] for x in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    )
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    rightly = []
    for _ in range(steps):
        chosen = torch.randint(len(images), (_BATCH,))
        batch = (images[chosen].float() - mean) / std
        batch = torch.where(torch.rand(_BATCH, 1, 1, 1) < 0.5, batch, batch.flip(3))
        logits = head(backbone(batch)[feature].mean((2, 3)))
        optimizer.zero_grad()
        F.cross_entropy(logits, labels[chosen]).backward()
        optimizer.step()
        schedule.step()
        rightly.append((logits.argmax(1) == labels[chosen]).float().mean().item())
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    save_whole({"model": state}, str(output))
    return float(np.mean(rightly[-50:]))


def cut_objects(annotation_file: Path, image_folder: Path) -> tuple[Tensor, Tensor]:
    """All objects of a data set, each in the middle of a square.

    Returns:
        (N, 3, 64, 64) uint8 RGB and (N,) int64, the places of their classes among the ids.
    """
    content = json.loads(annotation_file.read_text())
    ids = sorted(category["id"] for category in content["categories"])
    objects: dict[int, list[dict]] = {}
    for annotation in content["annotations"]:
        objects.setdefault(annotation["image_id"], []).append(annotation)
    crops, labels = [], []
    for record in content["images"]:
        if record["id"] not in objects:
            continue
        image = cv2.imread(str(image_folder / record["file_name"]))[..., ::-1]
        for annotation in objects[record["id"]]:
            crops.append(_cut(image, annotation["bbox"]))
            labels.append(ids.index(annotation["category_id"]))
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2), torch.tensor(labels)


def _cut(image: np.ndarray, box: list[float]) -> np.ndarray:
    """The square around a box (x, y, width, height), (64, 64, 3); the border is repeated."""
    x, y, width, height = box
    side = max(width, height) * (1 + 2 * _MARGIN)
    scale = CROP / side
    left, top = x + width / 2 - side / 2, y + height / 2 - side / 2
    matrix = np.array([[scale, 0, -left * scale], [0, scale, -top * scale]])
    return cv2.warpAffine(image, matrix, (CROP, CROP), borderMode=cv2.BORDER_REPLICATE)
