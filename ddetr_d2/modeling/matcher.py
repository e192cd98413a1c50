"""Bipartite matching between predictions and ground truth (paper, appendix A.2)."""

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_convert, generalized_box_iou

from ..layers.precision import at_least_float
from .classification import SigmoidClasses, SoftmaxClasses
from .heads import Predictions

# Cost of pairs whose own is not finite: above any other, and small enough to be added up.
_WORST = 1e6


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

    def to(self, device: torch.device) -> "Matches":
        """The same on a device, without waiting for it."""
        return Matches(*torch.stack(self).to(device, non_blocking=True))


class HungarianMatcher(nn.Module):
    """Find the assignment of queries to objects with the lowest total cost in each image."""

    def __init__(
        self,
        classification: SigmoidClasses | SoftmaxClasses,
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
    ):
        """
        Args:
            classification: the cost of classes.
            class_weight, l1_weight, giou_weight: weights of the terms.
        """
        super().__init__()
        self.classification = classification
        self.class_weight = class_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight

    @torch.no_grad()
    def forward(self, *groups: tuple[list[Predictions], list[Target]]) -> list[Matches]:
        """Match the predictions of several layers, each by itself.

        Costs of all layers and images travel to the host in one copy: the only time in a training
        step that it has to wait for a GPU.

        Args:
            groups: predictions of layers of one size for N images, and the ground truth of each
                of the N images.

        Returns:
            the matched pairs of each layer, one group after the other. Pairs whose cost is not
            finite are matched last, so that it is the loss that tells of them.
        """
        costs = [self._cost(layers, targets) for layers, targets in groups]
        flat = torch.cat([cost.flatten() for cost in costs]).cpu()
        blocks = flat.split([cost.numel() for cost in costs])
        return [
            _assign(layer, [len(target.labels) for target in targets]).to(cost.device)
            for (_, targets), cost, block in zip(groups, costs, blocks, strict=True)
            for layer in block.view(cost.shape)
        ]

    def _cost(self, layers: list[Predictions], targets: list[Target]) -> Tensor:
        """Cost (layers, N, Q, T) of every pair, T the largest number of objects in an image."""
        labels = pad_sequence([target.labels for target in targets], batch_first=True)
        target_boxes = pad_sequence([target.boxes for target in targets], batch_first=True)
        logits = at_least_float(torch.stack([layer.logits for layer in layers]))
        boxes = torch.stack([layer.boxes for layer in layers])
        return (
            self.class_weight * self.classification.cost(logits, labels)
            + self.l1_weight * (boxes[..., None, :] - target_boxes[:, None]).abs().sum(-1)
            - self.giou_weight
            * generalized_box_iou(
                box_convert(boxes, "cxcywh", "xyxy"), box_convert(target_boxes, "cxcywh", "xyxy")
            )
        )


def _assign(costs: Tensor, sizes: list[int]) -> Matches:
    """Solve the problem of each image, with costs (N, Q, T) on the host for ``sizes`` objects."""
    images, queries, matched = [], [], []
    first = 0
    for image, (cost, size) in enumerate(zip(costs, sizes, strict=True)):
        cost = cost[:, :size].nan_to_num(_WORST, posinf=_WORST, neginf=_WORST)
        query, target = (torch.from_numpy(x) for x in linear_sum_assignment(cost.numpy()))
        images.append(torch.full_like(query, image))
        queries.append(query)
        matched.append(target + first)
        first += size
    return Matches(torch.cat(images), torch.cat(queries), torch.cat(matched))
