"""Bipartite matching between predictions and ground truth (paper, appendix A.2)."""

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou

from .heads import Predictions, at_least_float


class Target(NamedTuple):
    """Ground truth of one image with T objects.

    Attributes:
        labels: (T,) int64 classes.
        boxes: (T, 4) as (cx, cy, w, h), fractions of the unpadded image size.
    """

    labels: Tensor
    boxes: Tensor


class Matches(NamedTuple):
    """Matched pairs of a batch: ``image[i]``, ``query[i]`` and ``target[i]``, the latter an index
    into the targets of all images one after the other."""

    image: Tensor
    query: Tensor
    target: Tensor


class HungarianMatcher(nn.Module):
    """Find the assignment of queries to objects with the lowest total cost in each image."""

    def __init__(
        self,
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
    ):
        super().__init__()
        self.class_weight = class_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma

    @torch.no_grad()
    def forward(self, layers: list[Predictions], targets: list[Target]) -> list[Matches]:
        """Match the predictions of several layers, each by itself.

        Costs of all layers and images travel to the host in one copy.

        Args:
            layers: predictions of each layer for N images.
            targets: ground truth of each of the N images.

        Returns:
            the matched pairs of each layer.

        Raises:
            FloatingPointError: if a cost is not finite.
        """
        costs = [
            [
                self._cost(logits, boxes, target)
                for logits, boxes, target in zip(layer.logits, layer.boxes, targets, strict=True)
            ]
            for layer in layers
        ]
        flat = torch.cat([cost.flatten() for layer in costs for cost in layer]).cpu()
        if not flat.isfinite().all():
            raise FloatingPointError(
                "predictions are not finite (NaN or infinity), so they cannot be matched: the "
                "training has diverged. Lower SOLVER.BASE_LR, clip gradients more "
                "(SOLVER.CLIP_GRADIENTS), or turn SOLVER.AMP.ENABLED off."
            )
        blocks = iter(flat.split([cost.numel() for layer in costs for cost in layer]))
        device = layers[0].logits.device
        return [
            self._assign([next(blocks).view(cost.shape) for cost in layer], device)
            for layer in costs
        ]

    def _assign(self, costs: list[Tensor], device: torch.device) -> Matches:
        images, queries, matched = [], [], []
        first = 0
        for image, cost in enumerate(costs):
            query, target = (torch.from_numpy(x) for x in linear_sum_assignment(cost.numpy()))
            images.append(torch.full_like(query, image))
            queries.append(query)
            matched.append(target + first)
            first += cost.shape[1]
        table = torch.stack([torch.cat(images), torch.cat(queries), torch.cat(matched)])
        return Matches(*table.to(device, non_blocking=True))

    def _cost(self, logits: Tensor, boxes: Tensor, target: Target) -> Tensor:
        """Cost (Q, T) of every pair in one image with ``logits`` (Q, K) and ``boxes`` (Q, 4)."""
        probability = at_least_float(logits)[:, target.labels].sigmoid()
        positive = (
            self.focal_alpha * (1 - probability) ** self.focal_gamma * -(probability + 1e-8).log()
        )
        negative = (
            (1 - self.focal_alpha) * probability**self.focal_gamma * -(1 - probability + 1e-8).log()
        )
        return (
            self.class_weight * (positive - negative)
            + self.l1_weight * torch.cdist(boxes, target.boxes, p=1)
            - self.giou_weight
            * generalized_box_iou(
                box_convert(boxes, "cxcywh", "xyxy"), box_convert(target.boxes, "cxcywh", "xyxy")
            )
        )
