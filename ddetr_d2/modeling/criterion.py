"""The set prediction loss (paper, section 3 and appendix A.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

from .heads import Predictions, at_least_float
from .matcher import HungarianMatcher, Matches, Target


class SetCriterion(nn.Module):
    """Focal loss on all queries; L1 and GIoU losses on the boxes of those matched to an object."""

    def __init__(
        self,
        matcher: HungarianMatcher,
        class_weight: float = 2.0,
        l1_weight: float = 5.0,
        giou_weight: float = 2.0,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
    ):
        super().__init__()
        self.matcher = matcher
        self.class_weight = class_weight
        self.l1_weight = l1_weight
        self.giou_weight = giou_weight
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma

    def forward(
        self,
        layers: list[Predictions],
        proposals: Predictions | None,
        targets: list[Target],
        num_boxes: Tensor | float,
    ) -> dict[str, Tensor]:
        """Weighted losses by name.

        Args:
            layers: predictions of the decoder layers, final ones last; earlier ones get the
                suffix ``_0``, ``_1`` ... in the names.
            proposals: the encoder's predictions (suffix ``_enc``), matched with all labels
                set to class 0.
            targets: ground truth of each image.
            num_boxes: number that the losses are divided by: of the boxes in the batch, averaged
                over the workers.
        """
        groups = [(layers, targets)]
        suffixes = [f"_{index}" for index in range(len(layers) - 1)] + [""]
        if proposals is not None:
            objects = [Target(torch.zeros_like(t.labels), t.boxes) for t in targets]
            groups.append(([proposals], objects))
            suffixes.append("_enc")
        cases = [(prediction, wanted) for group, wanted in groups for prediction in group]
        losses = {}
        for (prediction, wanted), matches, suffix in zip(
            cases, self.matcher(*groups), suffixes, strict=True
        ):
            losses |= self._losses(prediction, matches, wanted, num_boxes, suffix)
        return losses

    def _losses(
        self,
        predictions: Predictions,
        matches: Matches,
        targets: list[Target],
        num_boxes: Tensor | float,
        suffix: str,
    ) -> dict[str, Tensor]:
        labels = torch.cat([t.labels for t in targets])[matches.target]
        boxes = torch.cat([t.boxes for t in targets])[matches.target]
        matched = predictions.boxes[matches.image, matches.query]

        logits = at_least_float(predictions.logits)
        wanted = torch.zeros_like(logits)
        wanted[matches.image, matches.query, labels] = 1.0
        loss_class = sigmoid_focal_loss(
            logits, wanted, self.focal_alpha, self.focal_gamma, reduction="sum"
        )
        loss_l1 = F.l1_loss(matched, boxes, reduction="sum")
        # Pair by pair. torchvision's loss selects by a mask, for which the host waits for a GPU.
        giou = generalized_box_iou(
            box_convert(matched, "cxcywh", "xyxy")[:, None],
            box_convert(boxes, "cxcywh", "xyxy")[:, None],
        )
        return {
            f"loss_class{suffix}": self.class_weight * loss_class / num_boxes,
            f"loss_l1{suffix}": self.l1_weight * loss_l1 / num_boxes,
            f"loss_giou{suffix}": self.giou_weight * (1 - giou).sum() / num_boxes,
        }
