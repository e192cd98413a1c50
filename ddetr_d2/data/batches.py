"""Which images form a training step: a function of the seed and the number of the step.

Training reads an endless stream of samples: the data set shuffled anew in every epoch, one epoch
after the other. Batches are cut from that stream. Nothing here is remembered from step to step, so
a run is continued at any step without reading what came before.
"""

import bisect
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ..errors import UserError

# What a random number is for; part of what it is drawn from, so that no two uses share a stream.
_SHUFFLING, _ROUNDING = 0, 1


class Sample(NamedTuple):
    """One sample of the stream: its position, and the index of its record in the data set."""

    position: int
    record: int


def random_words(count: int, seed: int, *key: int) -> np.ndarray:
    """``count`` random uint64, a function of ``(seed, *key)`` alone.

    They are the raw output of a bit generator, which NumPy keeps the same in all its versions and
    on every platform. It does not promise that of ``Generator.permutation`` and the like.
    """
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)).random_raw(count)


def permutation(size: int, seed: int, *key: int) -> np.ndarray:
    """(size,) int64: ``range(size)`` in random order, a function of ``(seed, *key)`` alone."""
    return np.argsort(random_words(size, seed, *key), kind="stable")


class BatchOrder:
    """The order of a data set's images in training, in batches.

    Without groups, what is left of an epoch after its last whole batch is dropped, as the
    reference implementation does (a data set of fewer images than a batch is used as a whole; its
    batches continue into the next epoch). With groups, each batch is of one group, and
    comes when the last of its samples does; what is left of an epoch waits for the next one.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        *,
        groups: np.ndarray | None = None,
        repeat_factors: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            size: number of images in the data set, at least 1.
            batch_size: images in a batch.
            seed: 0 or more.
            groups: (size,) the group of each image, counted from 0.
            repeat_factors: (size,) how often an image comes in an epoch, on average. Fractions are
                rounded up or down at random in every epoch.
        """
        self._size = size
        self._batch_size = batch_size
        self._seed = seed
        self._drops_incomplete = groups is None
        self._groups = np.zeros(size, dtype=np.int64) if groups is None else groups
        self._repeat_factors = repeat_factors
        # Samples of each group before epochs 0, 1, ...
        first = self._group_sizes(0)
        self._starts = [np.zeros_like(first), first]

    def batches(self, step: int = 0) -> Iterator[list[Sample]]:
        """The batches of step ``step``, ``step + 1`` and so on without end."""
        epoch = self._epoch_of(step)
        skipped_batches = step - self._batches_before(epoch)
        # The groups' unfilled batches at the beginning of this epoch began in one before.
        in_whole_batches = self._start(epoch) // self._batch_size * self._batch_size
        first = epoch
        while (self._start(first) > in_whole_batches).any():
            first -= 1
        skipped_samples = (in_whole_batches - self._start(first)).tolist()

        position = int(self._start(first).sum())
        unfilled: list[list[Sample]] = [[] for _ in skipped_samples]
        for epoch in itertools.count(first):
            indices = self._indices(epoch)
            for index, group in zip(indices.tolist(), self._groups[indices].tolist(), strict=True):
                if skipped_samples[group]:
                    skipped_samples[group] -= 1
                else:
                    unfilled[group].append(Sample(position, index))
                position += 1
                if len(unfilled[group]) == self._batch_size:
                    if skipped_batches:
                        skipped_batches -= 1
                    else:
                        yield unfilled[group]
                    unfilled[group] = []

    def _counts(self, epoch: int) -> np.ndarray:
        """(size,) how often each image comes in an epoch, before the end of it is dropped."""
        if self._repeat_factors is None:
            return np.ones(self._size, dtype=np.int64)
        whole = np.floor(self._repeat_factors)
        chance = random_words(self._size, self._seed, _ROUNDING, epoch) / 2.0**64
        return (whole + (chance < self._repeat_factors - whole)).astype(np.int64)

    def _indices(self, epoch: int) -> np.ndarray:
        """(N,) the images of an epoch in their order."""
        indices = np.repeat(np.arange(self._size), self._counts(epoch))
        order = permutation(len(indices), self._seed, _SHUFFLING, epoch)
        return indices[order[: self._length(len(indices))]]

    def _length(self, samples: int) -> int:
        """How many of an epoch's samples are used."""
        if self._drops_incomplete and samples >= self._batch_size:
            return samples // self._batch_size * self._batch_size
        return samples

    def _group_sizes(self, epoch: int) -> np.ndarray:
        """(G,) samples of each group in an epoch."""
        counts = self._counts(epoch)
        if self._drops_incomplete:
            return np.array([self._length(int(counts.sum()))])
        return np.bincount(self._groups, weights=counts).astype(np.int64)

    def _start(self, epoch: int) -> np.ndarray:
        """(G,) samples of each group before an epoch."""
        if self._repeat_factors is None:  # all epochs are of the same length
            return epoch * self._starts[1]
        while len(self._starts) <= epoch:
            self._starts.append(self._starts[-1] + self._group_sizes(len(self._starts) - 1))
        return self._starts[epoch]

    def _batches_before(self, epoch: int) -> int:
        return int((self._start(epoch) // self._batch_size).sum())

    def _epoch_of(self, step: int) -> int:
        """The epoch in which the batch of a step becomes complete."""
        end = 1
        while self._batches_before(end) <= step:
            end *= 2
        return bisect.bisect_right(range(end), step, key=self._batches_before) - 1


def aspect_ratio_groups(records: list[dict]) -> np.ndarray:
    """(N,) 0 for images wider than high, 1 for the others.

    Raises:
        UserError: a record lacks "width" or "height".
    """
    for record in records:
        if "width" not in record or "height" not in record:
            raise UserError(
                f"the data set gives no width and height of image {record.get('file_name')}: set "
                "DATALOADER.ASPECT_RATIO_GROUPING to False"
            )
    return np.array([int(record["width"] <= record["height"]) for record in records])
