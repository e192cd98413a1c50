"""Prediction heads and the type in which predictions travel."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.ops import MLP

from ..layers.precision import at_least_float

PRIOR_PROBABILITY = 0.01


class Predictions(NamedTuple):
    """Detections of N images with Q queries each, over K classes.

    Attributes:
        logits: (N, Q, K) class scores before the sigmoid; with a softmax (N, Q, K + 1), "no object"
            last.
        boxes: (N, Q, 4) as (cx, cy, w, h), fractions of the unpadded image size.
    """

    logits: Tensor
    boxes: Tensor


class Detections(NamedTuple):
    """The best R predictions of N images, the best first.

    Attributes:
        scores: (N, R), 0 to 1.
        classes: (N, R) ints, 0 to K - 1.
        boxes: (N, R, 4) as (x0, y0, x1, y1), fractions of the unpadded image size.
        queries: (N, R) ints, the query that each comes from.
    """

    scores: Tensor
    classes: Tensor
    boxes: Tensor
    queries: Tensor


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """Logarithm of x / (1 - x), with x clamped to [0, 1] and both parts to at least ``eps``."""
    x = x.clamp(min=0, max=1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def at_most(count: int, size: int | torch.SymInt | Tensor) -> Any:
    """The smaller of a count and the size of a tensor, of the size's type.

    The size is a symbol while a model is exported and a tensor while it is traced, and what it is
    at that time must not decide.
    """
    if isinstance(size, Tensor):
        return size.clamp(max=count)
    return torch.sym_min(count, size) if isinstance(size, torch.SymInt) else min(count, size)


class DetectionHead(nn.Module):
    """Class scores and a box for each feature (DETR, section 3.2; Deformable DETR, A.4)."""

    def __init__(
        self,
        hidden_dim: int,
        num_outputs: int,
        *,
        prior_probability: float | None = PRIOR_PROBABILITY,
        size_bias: float | None = 0.0,
    ):
        """
        Args:
            hidden_dim: width C of the features.
            num_outputs: class scores per feature.
            prior_probability: initial probability of each class; None leaves biases as PyTorch
                draws them.
            size_bias: initial bias of (w, h) before the sigmoid, all boxes being those of the
                references; -2 starts from small boxes. None leaves boxes as PyTorch draws them.
        """
        super().__init__()
        self.class_embed = nn.Linear(hidden_dim, num_outputs)
        if prior_probability is not None:
            nn.init.constant_(
                self.class_embed.bias, -math.log((1 - prior_probability) / prior_probability)
            )
        self.bbox_embed = MLP(hidden_dim, [hidden_dim, hidden_dim, 4], inplace=False)
        if size_bias is not None:
            last = self.bbox_embed[-2]
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            nn.init.constant_(last.bias[2:], size_bias)

    def forward(self, features: Tensor, reference_logits: Tensor | None) -> Predictions:
        """Predict relative to reference points or boxes, or without any.

        Args:
            features: (N, Q, C).
            reference_logits: (N, Q, 2 or 4), references before the sigmoid; a point moves the
                centre of the box only. None: boxes are predicted as they are.
        """
        delta = at_least_float(self.bbox_embed(features))
        if reference_logits is None:
            return Predictions(self.class_embed(features), delta.sigmoid())
        if reference_logits.shape[-1] == 2:
            reference_logits = nn.functional.pad(reference_logits, (0, 2))
        return Predictions(self.class_embed(features), (delta + reference_logits).sigmoid())
