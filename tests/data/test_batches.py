"""The order of the images in training: epochs, groups, repeats, and any step at once."""

import itertools
import time

from ddetr_d2.data.batches import BatchOrder, permutation

import numpy as np
import pytest


def indices(order: BatchOrder, count: int, step: int = 0) -> list[list[int]]:
    return [[s.record for s in batch] for batch in itertools.islice(order.batches(step), count)]


def test_an_epoch_has_each_image_once_and_drops_the_incomplete_batch():
    order = indices(BatchOrder(118_287, 32, seed=0), 3696 + 1)
    epoch = [index for batch in order[:3696] for index in batch]
    assert len(set(epoch)) == 3696 * 32
    small = indices(BatchOrder(7, 2, seed=0), 6)
    assert all(len({*sum(small[i : i + 3], [])}) == 6 for i in (0, 3))
    assert small[:3] != small[3:]


def test_fewer_images_than_a_batch():
    """Batches run on from epoch to epoch, and nothing is dropped."""
    batches = indices(BatchOrder(3, 8, seed=0), 6)
    stream = sum(batches, [])
    assert all(sorted(stream[i : i + 3]) == [0, 1, 2] for i in range(0, 48, 3))
    assert indices(BatchOrder(1, 2, seed=0), 1) == [[0, 0]]


def test_groups_are_not_mixed_and_nothing_is_dropped():
    groups = np.array([0, 1, 1, 0, 0, 1, 0, 0, 0])
    batches = indices(BatchOrder(9, 4, seed=3, groups=groups), 18)
    assert all(len({*groups[batch]}) == 1 for batch in batches)
    counts = np.bincount(sum(batches, []), minlength=9)  # 72 samples: 8 epochs, but for the rests
    assert counts.min() >= 7 and counts.max() <= 9


@pytest.mark.parametrize("size, batch_size", [(7, 2), (3, 8), (8, 4), (1, 3), (50, 7)])
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("repeated", [False, True])
def test_moving_forward_equals_drawing(size, batch_size, grouped, repeated):
    order = BatchOrder(
        size,
        batch_size,
        seed=11,
        groups=np.arange(size) % 3 // 2 if grouped else None,
        repeat_factors=1 + np.arange(size) % 4 / 3 if repeated else None,
    )
    drawn = list(itertools.islice(order.batches(), 60))
    for step in range(60):
        assert next(order.batches(step)) == drawn[step]
    positions = [sample.position for batch in drawn for sample in batch]
    assert len({*positions}) == len(positions)


def test_far_steps_of_coco_are_reached_at_once():
    groups = (np.arange(118_287) % 4 == 0).astype(int)
    for kwargs in ({}, {"groups": groups}):
        started = time.perf_counter()
        next(BatchOrder(118_287, 32, seed=0, **kwargs).batches(200_000))
        assert time.perf_counter() - started < 2
    next(BatchOrder(4, 2, seed=0, groups=np.array([0, 0, 0, 1])).batches(10**9))


def test_the_order_is_the_same_everywhere():
    """Written down, so that another version of NumPy cannot change a run unnoticed."""
    assert permutation(8, 42, 0, 7).tolist() == [7, 2, 1, 3, 0, 6, 4, 5]


def test_repeat_factors():
    """Images of rare classes come more often, by the fractions on average."""
    factors = np.array([1.0, 1.0, 2.5, 1.25])
    batches = indices(BatchOrder(4, 1, seed=0, repeat_factors=factors), 4000)
    counts = np.bincount(sum(batches, []))
    assert counts / counts[0] == pytest.approx(factors, rel=0.05)
