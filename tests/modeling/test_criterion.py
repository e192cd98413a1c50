"""SetCriterion against losses written out pair by pair."""

import math

from ddetr_d2.modeling.classification import SigmoidClasses
from ddetr_d2.modeling.criterion import SetCriterion
from ddetr_d2.modeling.heads import Predictions
from ddetr_d2.modeling.matcher import HungarianMatcher, Target

import torch

from .test_matcher import giou, random_boxes


def slow_losses(predictions, pairs, targets, num_boxes):
    """``pairs``: {(image, query): target index}."""
    loss_class = loss_l1 = loss_giou = 0.0
    for image in range(predictions.logits.shape[0]):
        for query in range(predictions.logits.shape[1]):
            target = pairs.get((image, query))
            for k, logit in enumerate(predictions.logits[image, query].tolist()):
                p = 1 / (1 + math.exp(-logit))
                if target is not None and targets[image].labels[target] == k:
                    loss_class += 0.25 * (1 - p) ** 2 * -math.log(p)
                else:
                    loss_class += 0.75 * p**2 * -math.log(1 - p)
            if target is not None:
                box = predictions.boxes[image, query].tolist()
                wanted = targets[image].boxes[target].tolist()
                loss_l1 += sum(abs(x - y) for x, y in zip(box, wanted, strict=True))
                loss_giou += 1 - giou(box, wanted)
    return 2 * loss_class / num_boxes, 5 * loss_l1 / num_boxes, 2 * loss_giou / num_boxes


def test_every_layer_and_the_proposals():
    torch.manual_seed(1)
    matcher = HungarianMatcher(SigmoidClasses())
    layers = [
        Predictions(torch.randn(2, 6, 3, dtype=torch.float64), random_boxes(2, 6)) for _ in range(3)
    ]
    proposals = Predictions(torch.randn(2, 9, 3, dtype=torch.float64), random_boxes(2, 9))
    targets = [
        Target(torch.tensor([2, 0, 1]), random_boxes(3)),
        Target(torch.tensor([1]), random_boxes(1)),
    ]
    losses = SetCriterion(matcher)(layers, proposals, targets)
    assert len(losses) == 3 * 4

    background = [Target(torch.zeros_like(t.labels), t.boxes) for t in targets]
    cases = [
        (layer, targets, suffix) for layer, suffix in zip(layers, ("_0", "_1", ""), strict=True)
    ]
    for prediction, wanted, suffix in [*cases, (proposals, background, "_enc")]:
        (matches,) = matcher(([prediction], wanted))
        starts = (0, len(targets[0].labels))
        pairs = {
            (int(i), int(q)): int(t) - starts[int(i)]
            for i, q, t in zip(matches.image, matches.query, matches.target, strict=True)
        }
        expected = slow_losses(prediction, pairs, wanted, num_boxes=4)
        actual = [losses[f"loss_{name}{suffix}"] for name in ("class", "l1", "giou")]
        # The focal loss is computed in float32.
        torch.testing.assert_close(
            torch.stack(actual).double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-6
        )


def test_a_batch_without_objects_trains_the_classes_only():
    logits = torch.randn(2, 4, 3, requires_grad=True)
    boxes = random_boxes(2, 4).float().requires_grad_()
    empty = Target(torch.zeros(0, dtype=torch.long), torch.zeros(0, 4))
    criterion = SetCriterion(HungarianMatcher(SigmoidClasses()))
    losses = criterion([Predictions(logits, boxes)], None, [empty, empty])
    assert losses["loss_l1"] == 0 and losses["loss_giou"] == 0
    sum(losses.values()).backward()
    assert logits.grad.abs().sum() > 0
    assert boxes.grad is not None and boxes.grad.abs().sum() == 0  # needed by data parallelism
