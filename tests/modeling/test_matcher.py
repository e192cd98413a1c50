"""HungarianMatcher against an exhaustive search."""

import itertools
import math

from ddetr_d2.modeling.classification import SigmoidClasses
from ddetr_d2.modeling.heads import Predictions
from ddetr_d2.modeling.matcher import HungarianMatcher, Target

import pytest
import torch


def random_boxes(*shape):
    centers = 0.3 + 0.4 * torch.rand(*shape, 2, dtype=torch.float64)
    return torch.cat((centers, 0.05 + 0.4 * torch.rand(*shape, 2, dtype=torch.float64)), dim=-1)


def giou(a, b):
    """Generalised IoU of two (cx, cy, w, h) boxes in plain Python."""
    ax0, ay0, ax1, ay1 = a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2
    bx0, by0, bx1, by1 = b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2
    width = max(0.0, min(ax1, bx1) - max(ax0, bx0))
    height = max(0.0, min(ay1, by1) - max(ay0, by0))
    union = a[2] * a[3] + b[2] * b[3] - width * height
    hull = (max(ax1, bx1) - min(ax0, bx0)) * (max(ay1, by1) - min(ay0, by0))
    return width * height / union - (hull - union) / hull


def pair_cost(logit, box, target_box):
    p = 1 / (1 + math.exp(-logit))
    class_cost = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8)
    class_cost -= 0.75 * p**2 * -math.log(1 - p + 1e-8)
    l1 = sum(abs(x - y) for x, y in zip(box, target_box, strict=True))
    return 2 * class_cost + 5 * l1 - 2 * giou(box, target_box)


def test_finds_the_cheapest_assignment():
    torch.manual_seed(0)
    layers = [
        Predictions(torch.randn(2, 5, 3, dtype=torch.float64), random_boxes(2, 5)) for _ in range(2)
    ]
    targets = [
        Target(torch.tensor([2, 0, 1]), random_boxes(3)),
        Target(torch.tensor([1, 1]), random_boxes(2)),
    ]
    for layer, matches in zip(
        layers, HungarianMatcher(SigmoidClasses())((layers, targets)), strict=True
    ):
        first = 0
        for image, target in enumerate(targets):
            cost = [
                [
                    pair_cost(
                        layer.logits[image, q, label].item(),
                        layer.boxes[image, q].tolist(),
                        box.tolist(),
                    )
                    for label, box in zip(target.labels, target.boxes, strict=True)
                ]
                for q in range(5)
            ]
            best = min(
                itertools.permutations(range(5), len(target.labels)),
                key=lambda queries, cost=cost: sum(cost[q][t] for t, q in enumerate(queries)),
            )
            mine = matches.image == image
            found = dict(
                zip(
                    (matches.target[mine] - first).tolist(),
                    matches.query[mine].tolist(),
                    strict=True,
                )
            )
            assert found == dict(enumerate(best))
            first += len(target.labels)


def test_images_without_objects_match_nothing():
    layer = Predictions(torch.randn(2, 4, 3), random_boxes(2, 4).float())
    empty = Target(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4))
    one = Target(torch.tensor([1]), random_boxes(1).float())
    (matches,) = HungarianMatcher(SigmoidClasses())(([layer], [empty, one]))
    assert matches.image.tolist() == [1]
    assert matches.target.tolist() == [0]
    (matches,) = HungarianMatcher(SigmoidClasses())(([layer], [empty, empty]))
    assert matches.query.numel() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_predictions_that_are_not_finite_are_matched_last(value):
    boxes = random_boxes(1, 4)
    target = Target(torch.tensor([0, 1, 2]), boxes[0, :3].clone())
    logits = torch.zeros(1, 4, 3, dtype=torch.float64)
    boxes[0, 1] = value
    (matches,) = HungarianMatcher(SigmoidClasses())(([Predictions(logits, boxes)], [target]))
    assert sorted(matches.query.tolist()) == [0, 2, 3]
    assert dict(zip(matches.query.tolist(), matches.target.tolist(), strict=True))[0] == 0
    (matches,) = HungarianMatcher(SigmoidClasses())(
        ([Predictions(logits * value, boxes * value)], [target])
    )
    assert len(matches.query) == 3
