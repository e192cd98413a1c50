"""How class scores are compared with ground truth, learned and read.

Deformable DETR has K independent classes and the focal loss; DETR has a softmax over K classes and
"no object". The weight of the term is the matcher's and the criterion's, not of what is here.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from detectron2.utils import comm
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from ..layers.precision import at_least_float
from .heads import at_most


class BestClasses(NamedTuple):
    """The R best pairs of query and class of N images, the best first.

    Attributes:
        scores: (N, R), 0 to 1.
        classes: (N, R) ints, 0 to K - 1.
        queries: (N, R) ints.
    """

    scores: Tensor
    classes: Tensor
    queries: Tensor


class BatchCounts(NamedTuple):
    """What the losses of a step are divided by: numbers of its whole batch, averaged over the
    processes.

    Attributes:
        boxes: boxes of all images.
        matched: those that have a query, of which an image may have too few.
        images: images.
    """

    boxes: Tensor
    matched: Tensor
    images: Tensor

    @classmethod
    def of(cls, numbers: Sequence[int], num_queries: int, device: torch.device) -> "BatchCounts":
        """Count one process's images with these numbers of boxes."""
        counts = torch.zeros(3, device=device)
        # Filled one by one: a copy from the host would wait for the device.
        counts[0].fill_(sum(numbers))
        counts[1].fill_(sum(min(number, num_queries) for number in numbers))
        counts[2].fill_(len(numbers))
        return cls(*counts.unbind())


class SigmoidClasses:
    """One sigmoid per class, with the focal loss (Lin et al., 2017; Deformable DETR, A.4)."""

    # Outputs of a head beyond one per class.
    extra_outputs = 0

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0):
        """
        Args:
            alpha: weight of a class that is there; 1 - alpha is that of one that is not.
            gamma: how much less pairs count that are right already.
        """
        self.alpha = alpha
        self.gamma = gamma

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cost of giving queries to objects.

        Args:
            logits: (layers, N, Q, K).
            labels: (N, T) class of each object.

        Returns:
            (layers, N, Q, T)
        """
        probability = _of_labels(logits, labels).sigmoid()
        positive = self.alpha * (1 - probability) ** self.gamma * -(probability + 1e-8).log()
        negative = (1 - self.alpha) * probability**self.gamma * -(1 - probability + 1e-8).log()
        return positive - negative

    def loss(
        self,
        logits: Tensor,
        matched: tuple[Tensor, Tensor],
        labels: Tensor,
        counts: BatchCounts,
    ) -> Tensor:
        """Loss of all queries over the number of boxes.

        Args:
            logits: (N, Q, K).
            matched: image and query (P,) of each matched pair.
            labels: (P,) class of the pair's object.
            counts: of the whole batch.
        """
        one_hot = torch.zeros_like(logits)
        one_hot[(*matched, labels)] = 1.0
        return sigmoid_focal_loss(logits, one_hot, self.alpha, self.gamma, "sum") / at_least_one(
            counts.boxes
        )

    def best(self, logits: Tensor, count: int) -> BestClasses:
        """The best pairs of query and class; a query can appear with several classes.

        Args:
            logits: (N, Q, K).
            count: how many to keep of each image.
        """
        scores = at_least_float(logits).sigmoid().flatten(1)
        scores, pairs = scores.topk(at_most(count, scores.shape[1]), dim=1)
        num_classes = logits.shape[-1]
        return BestClasses(scores, pairs % num_classes, pairs // num_classes)


class SoftmaxClasses:
    """A softmax over K classes and "no object", with cross-entropy (DETR, section 3.1)."""

    extra_outputs = 1

    def __init__(self, no_object_weight: float = 0.1):
        """
        Args:
            no_object_weight: weight of queries without an object; others have 1.
        """
        self.no_object_weight = no_object_weight

    def cost(self, logits: Tensor, labels: Tensor) -> Tensor:
        """As :meth:`SigmoidClasses.cost`, for logits (layers, N, Q, K + 1)."""
        return -_of_labels(logits.softmax(-1), labels)

    def loss(
        self,
        logits: Tensor,
        matched: tuple[Tensor, Tensor],
        labels: Tensor,
        counts: BatchCounts,
    ) -> Tensor:
        """Weighted cross-entropy of all queries over the sum of their weights.

        The sum is that of the whole batch, so that the loss does not depend on how the batch is
        cut into micro-batches and spread over processes.

        Args:
            logits: (N, Q, K + 1).
            matched: image and query (P,) of each matched pair.
            labels: (P,) class of the pair's object.
            counts: of the whole batch.
        """
        queries, outputs = logits.shape[1:]
        classes = torch.full(logits.shape[:2], outputs - 1, device=logits.device)
        classes[matched] = labels
        weights = logits.new_ones(outputs)
        weights[-1] = self.no_object_weight
        loss = F.cross_entropy(logits.flatten(0, 1), classes.flatten(), weights, reduction="sum")
        boxes, images = counts.matched.to(logits), counts.images.to(logits)
        return loss / (boxes + self.no_object_weight * (images * queries - boxes))

    def best(self, logits: Tensor, count: int) -> BestClasses:
        """The best class, "no object" aside, of each query.

        Args:
            logits: (N, Q, K + 1).
            count: how many queries to keep of each image.
        """
        scores, classes = at_least_float(logits).softmax(-1)[..., :-1].max(-1)
        scores, queries = scores.topk(at_most(count, scores.shape[1]), dim=1)
        return BestClasses(scores, classes.gather(1, queries), queries)


def at_least_one(num_boxes: Tensor) -> Tensor:
    """A number of boxes, averaged over the processes, to divide by: one in all if there is none."""
    return num_boxes.clamp(min=1 / comm.get_world_size())


def _of_labels(values: Tensor, labels: Tensor) -> Tensor:
    """Values (layers, N, Q, K) of each object's class (N, T): (layers, N, Q, T)."""
    return values.gather(-1, labels[:, None].expand(*values.shape[:-1], labels.shape[1]))
