"""The set prediction loss (paper, section 3 and appendix A.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou

from ..layers.precision import at_least_float
from .classification import BatchCounts, at_least_one
from .heads import Predictions
from .matcher import HungarianMatcher, Matches, Target


class SetCriterion(nn.Module):
    """A loss of the classes on all queries; L1 and GIoU losses on the boxes of those matched to an
    object."""

    def __init__(
        self,
        matcher: HungarianMatcher,
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
    ):
        """
        Args:
            matcher: finds the object of each query; it has the loss of the classes too.
            class_weight, l1_weight, giou_weight: weights of the terms.
        """
        super().__init__()
        self.matcher = matcher
        self.class_weight = class_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight

    def forward(
        self,
        layers: list[Predictions],
        proposals: Predictions | None,
        targets: list[Target],
        counts: BatchCounts | None = None,
    ) -> dict[str, Tensor]:
        """Weighted losses by name.

        Args:
            layers: predictions of the decoder layers, final ones last; earlier ones get the
                suffix ``_0``, ``_1`` ... in the names.
            proposals: the encoder's predictions (suffix ``_enc``), matched with all labels
                set to class 0.
            targets: ground truth of each image.
            counts: what the losses are divided by, the numbers of ``targets`` by default. Where
                there are no boxes, losses of boxes are divided by one.
        """
        if counts is None:
            numbers = [len(target.labels) for target in targets]
            counts = BatchCounts.of(numbers, layers[0].boxes.shape[1], layers[0].boxes.device)
        groups = [(layers, targets)]
        suffixes = [f"_{index}" for index in range(len(layers) - 1)] + [""]
        if proposals is not None:
            objects = [Target(torch.zeros_like(t.labels), t.boxes) for t in targets]
            groups.append(([proposals], objects))
            suffixes.append("_enc")
        cases = [(prediction, objects) for group, objects in groups for prediction in group]
        losses: dict[str, Tensor] = {}
        for (prediction, objects), matches, suffix in zip(
            cases, self.matcher(*groups), suffixes, strict=True
        ):
            parts = self._losses(prediction, matches, objects, counts)
            losses |= {f"{name}{suffix}": loss for name, loss in parts.items()}
        return losses

    def _losses(
        self,
        predictions: Predictions,
        matches: Matches,
        targets: list[Target],
        counts: BatchCounts,
    ) -> dict[str, Tensor]:
        labels = torch.cat([t.labels for t in targets])[matches.target]
        boxes = torch.cat([t.boxes for t in targets])[matches.target]
        pairs = (matches.image, matches.query)
        matched = predictions.boxes[pairs]

        logits = at_least_float(predictions.logits)
        loss_class = self.matcher.classification.loss(logits, pairs, labels, counts)
        loss_l1 = F.l1_loss(matched, boxes, reduction="sum")
        # Pair by pair. torchvision's loss selects by a mask, for which the host waits for a GPU.
        giou = generalized_box_iou(
            box_convert(matched, "cxcywh", "xyxy")[:, None],
            box_convert(boxes, "cxcywh", "xyxy")[:, None],
        )
        num_boxes = at_least_one(counts.boxes)
        return {
            "loss_class": self.class_weight * loss_class,
            "loss_l1": self.l1_weight * loss_l1 / num_boxes,
            "loss_giou": self.giou_weight * (1 - giou).sum() / num_boxes,
        }
