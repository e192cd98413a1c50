"""Costs, losses and detections of the two ways to read classes, against loops."""

import math

from ddetr_d2.modeling.classification import (
    BatchCounts,
    SigmoidClasses,
    SoftmaxClasses,
    at_least_one,
)

import pytest
import torch


def random_logits(outputs, *leading):
    torch.manual_seed(0)
    return torch.randn(*leading, outputs, dtype=torch.float64)


def softmax(row):
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def test_cost_of_a_softmax_is_the_negative_probability():
    logits = random_logits(4, 2, 3, 5)  # two layers, three images, five queries
    labels = torch.tensor([[0, 2], [1, 1], [2, 0]])
    cost = SoftmaxClasses().cost(logits, labels)
    assert cost.shape == (2, 3, 5, 2)
    for layer, image, query, target in torch.cartesian_prod(
        *map(torch.arange, cost.shape)
    ).tolist():
        row = softmax(logits[layer, image, query].tolist())
        expected = -row[labels[image, target]]
        assert cost[layer, image, query, target].item() == pytest.approx(expected, abs=1e-12)


def slow_cross_entropy(logits, objects, weight):
    """``objects`` maps (image, query) to a class."""
    total = weights = 0.0
    for image, queries in enumerate(logits.tolist()):
        for query, row in enumerate(queries):
            label = objects.get((image, query), len(row) - 1)
            w = 1.0 if (image, query) in objects else weight
            total -= w * math.log(softmax(row)[label])
            weights += w
    return total / weights


@pytest.mark.parametrize("objects", [{(0, 1): 2, (0, 3): 0, (1, 0): 1}, {(1, 2): 0}, {}])
def test_cross_entropy_is_averaged_with_weights(objects):
    logits = random_logits(4, 2, 5)
    images = torch.tensor([image for image, _ in objects], dtype=torch.long)
    queries = torch.tensor([query for _, query in objects], dtype=torch.long)
    labels = torch.tensor([*objects.values()], dtype=torch.long)
    counts = BatchCounts(*torch.tensor([7, len(objects), 2], dtype=torch.float64))
    loss = SoftmaxClasses(0.3).loss(logits, (images, queries), labels, counts)
    assert loss.item() == pytest.approx(slow_cross_entropy(logits, objects, 0.3), rel=1e-12)


def test_cross_entropy_does_not_depend_on_how_the_batch_is_cut():
    logits = random_logits(4, 2, 5)
    pairs, labels = (torch.tensor([0, 1]), torch.tensor([1, 0])), torch.tensor([2, 1])
    classes, counts = SoftmaxClasses(), BatchCounts(*torch.tensor([2.0, 2.0, 2.0]))
    whole = classes.loss(logits, pairs, labels, counts)
    first = torch.tensor([0])
    parts = [
        classes.loss(logits[i : i + 1], (first, pairs[1][i : i + 1]), labels[i : i + 1], counts)
        for i in range(2)
    ]
    torch.testing.assert_close(sum(parts), whole)


def test_the_best_of_a_softmax_is_one_class_per_query():
    logits = torch.tensor([[[0.0, 3.0, 1.0], [2.0, 0.0, 5.0], [4.0, 1.0, 0.0]]])
    best = SoftmaxClasses().best(logits, 2)
    assert best.queries.tolist() == [[2, 0]]
    assert best.classes.tolist() == [[0, 1]]
    expected = [softmax([4.0, 1.0, 0.0])[0], softmax([0.0, 3.0, 1.0])[1]]
    torch.testing.assert_close(best.scores, torch.tensor([expected]))
    # "No object" is no class, however likely, but the rest of that query still counts.
    assert SoftmaxClasses().best(logits, 9).queries.tolist() == [[2, 0, 1]]
    assert SoftmaxClasses().best(logits, 9).classes.tolist() == [[0, 1, 0]]


def test_the_best_of_sigmoids_are_pairs():
    logits = torch.tensor([[[0.0, 3.0], [2.0, -1.0]]])
    best = SigmoidClasses().best(logits, 3)
    assert best.queries.tolist() == [[0, 1, 0]]
    assert best.classes.tolist() == [[1, 0, 0]]
    torch.testing.assert_close(best.scores, torch.tensor([[3.0, 2.0, 0.0]]).sigmoid())


def test_divided_by_one_where_there_are_no_boxes():
    assert at_least_one(torch.tensor(0.0)) == 1
    assert at_least_one(torch.tensor(2.5)) == 2.5
