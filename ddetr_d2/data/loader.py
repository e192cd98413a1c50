"""The training images in batches, the same ones however many processes and workers load them.

A step's images are a function of the seed and the number of the step (:mod:`.batches`), and the
random augmentation of an image is one of the seed and its position in the stream. So a run is
continued at any step, by any number of processes, each with any number of workers.
"""

import contextlib
import gc
import hashlib
import logging
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.build import trivial_batch_collator
from detectron2.data.samplers import RepeatFactorTrainingSampler
from torch.utils.data import DataLoader, Dataset, get_worker_info

from ..errors import UserError
from .batches import BatchOrder, Sample, aspect_ratio_groups, permutation, random_words
from .transfer import pack, unpack
from .unreadable import UnreadableImage, UnreadableImages
from .wording import counted, plural

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Mapper = Callable[[Record], Record]

SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")
# Images tried in the place of one that cannot be used.
_MAX_REPLACEMENTS = 100
# What a random number is for, beside the uses in batches.py.
_AUGMENTATION, _REPLACEMENT = 2, 3


def build_train_loader(
    cfg: CfgNode,
    records: list[Record],
    mapper: Mapper,
    *,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> "TrainLoader":
    """The loader that the configuration asks for.

    It reads ``SOLVER.IMS_PER_BATCH`` (images in a step, of all processes), ``ACCUMULATE_STEPS``,
    ``DATALOADER.NUM_WORKERS``, ``ASPECT_RATIO_GROUPING``, ``SAMPLER_TRAIN``, ``REPEAT_THRESHOLD``
    and ``MAX_UNREADABLE``. Images that cannot be used are listed in ``unreadable_images.txt`` in
    ``OUTPUT_DIR``.

    Raises:
        UserError: there are no records, or a key's value does not work.
    """
    loading = cfg.DATALOADER
    if loading.SAMPLER_TRAIN not in SAMPLERS:
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN is {loading.SAMPLER_TRAIN!r}; expected one of "
            + ", ".join(SAMPLERS)
        )
    repeat_factors = None
    if loading.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        repeat_factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, loading.REPEAT_THRESHOLD
        ).numpy()
    return TrainLoader(
        records,
        mapper,
        batch_size=cfg.SOLVER.IMS_PER_BATCH,
        seed=seed,
        accumulate=cfg.SOLVER.ACCUMULATE_STEPS,
        rank=rank,
        world_size=world_size,
        num_workers=loading.NUM_WORKERS,
        aspect_ratio_grouping=loading.ASPECT_RATIO_GROUPING,
        repeat_factors=repeat_factors,
        max_unreadable=loading.MAX_UNREADABLE,
        unreadable_file=Path(cfg.OUTPUT_DIR) / "unreadable_images.txt" if rank == 0 else None,
    )


class TrainLoader:
    """Endless training batches of one process.

    Iterating yields, for each step, a list of ``accumulate`` micro-batches, each a list of mapped
    records. The workers load ahead, but the loader's state is a function of the step that the
    caller has come to.

    Attributes:
        seed: of the order and the augmentation; :meth:`load_state_dict` replaces it.
        unreadable: the images that could not be used. The caller has to call its ``agree`` in
            every step.
    """

    def __init__(
        self,
        records: list[Record],
        mapper: Mapper,
        *,
        batch_size: int,
        seed: int,
        accumulate: int = 1,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        aspect_ratio_grouping: bool = False,
        repeat_factors: np.ndarray | None = None,
        max_unreadable: float = 0.01,
        unreadable_file: str | Path | None = None,
    ) -> None:
        """
        Args:
            records: the data set in Detectron2's format.
            mapper: makes the model's input of a record, with random numbers of Python's, NumPy's
                and PyTorch's global generators. A UserError says that the image cannot be used.
            batch_size: images in a step, of all processes and micro-batches together.
            seed: 0 or more.
            accumulate: micro-batches that a process's images of a step are cut into.
            rank: number of this process.
            world_size: number of processes.
            num_workers: processes that load images for this one; 0 loads them in this one.
            aspect_ratio_grouping: whether a batch has only images wider than high, or only others.
            repeat_factors: (N,) how often a record comes in an epoch, on average.
            max_unreadable: share of the images that may be unreadable.
            unreadable_file: list of them; None for no file.

        Raises:
            UserError: there are no records, or a number is out of its range.
        """
        if not records:
            raise UserError("the training set has no images (DATASETS.TRAIN)")
        if num_workers < 0:
            raise UserError(f"DATALOADER.NUM_WORKERS is {num_workers}: give 0 or more")
        if seed < 0:
            raise ValueError(f"the seed is {seed}; expected 0 or more")
        self.seed = seed
        self._images_per_micro_batch = _micro_batch_size(batch_size, world_size, accumulate)
        self._records = DatasetFromList(records)
        self._mapper = mapper
        self._batch_size = batch_size
        self._accumulate = accumulate
        self._rank = rank
        self._num_workers = num_workers
        self._groups = aspect_ratio_groups(records) if aspect_ratio_grouping else None
        self._repeat_factors = repeat_factors
        self._fingerprint = fingerprint(records)
        self._first_step = 0
        self.unreadable = UnreadableImages(
            len({record["file_name"] for record in records}), max_unreadable, unreadable_file
        )

    def start_from(self, step: int) -> None:
        """Let the next iteration begin with the batch of ``step``, counted from 0."""
        self._first_step = step

    def state_dict(self, step: int) -> dict[str, Any]:
        """What is needed to go on with the batch of ``step``; numbers and strings only.

        It is the same for every process, once the processes agree on the unreadable images.
        """
        return {
            "step": step,
            "seed": self.seed,
            "images": len(self._records),
            "fingerprint": self._fingerprint,
            "batch_size": self._batch_size,
            "aspect_ratio_grouping": self._groups is not None,
            "repeat_factors": self._repeat_factors is not None,
            "unreadable": self.unreadable.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next iteration begin where :meth:`state_dict` was taken, with its seed.

        The number of processes, workers and micro-batches may be another one. Another batch size,
        other annotations and the like are warned of: the run goes on, but is no longer the same.

        Raises:
            UserError: the number of images is another one.
        """
        own = self.state_dict(state["step"])
        if state["images"] != own["images"]:
            raise UserError(
                f"the run was started on {counted(state['images'], 'training image')}, and now "
                f"there {plural(own['images'], 'is', 'are')} {own['images']:,}: resume it with the "
                "same data set, or start a new run (without --resume, in another OUTPUT_DIR) from "
                "its weights"
            )
        names = {
            "fingerprint": "the annotations",
            "batch_size": "SOLVER.IMS_PER_BATCH",
            "aspect_ratio_grouping": "DATALOADER.ASPECT_RATIO_GROUPING",
            "repeat_factors": "DATALOADER.SAMPLER_TRAIN",
        }
        changed = [name for key, name in names.items() if state[key] != own[key]]
        if changed:
            logger.warning(
                "%s changed since the checkpoint: the run goes on, but with other images in its "
                "steps than it would have had",
                " and ".join(changed),
            )
        self.seed = state["seed"]
        self.unreadable.load_state_dict(state["unreadable"])
        self.start_from(state["step"])

    def __iter__(self) -> Generator[list[list[Record]], None, None]:
        """
        Raises:
            UserError: nothing can be read in the place of an unreadable image, or a worker died.
        """
        self.unreadable.start_list()
        # The stream has no end, and so the workers live as long as this iteration. With a
        # generator of its own, the DataLoader leaves PyTorch's global one alone.
        loader = DataLoader(
            _MappedSamples(self._records, self._mapper, self.seed),
            batch_sampler=self._micro_batches(),
            num_workers=self._num_workers,
            collate_fn=pack if self._num_workers else trivial_batch_collator,
            worker_init_fn=_leave_signals_to_main_process,
            generator=torch.Generator(),
        )
        with _worker_deaths_wait_for_the_next_batch(), _no_signals_yet():
            loaded = iter(loader)
        while True:
            yield [self._next(loaded) for _ in range(self._accumulate)]

    def _micro_batches(self) -> Iterator[list[Sample]]:
        """The samples of this process's micro-batches, from its first step on."""
        order = BatchOrder(
            len(self._records),
            self._batch_size,
            self.seed,
            groups=self._groups,
            repeat_factors=self._repeat_factors,
        )
        size = self._images_per_micro_batch
        first = self._rank * self._accumulate * size
        for batch in order.batches(self._first_step):
            for i in range(first, first + self._accumulate * size, size):
                yield batch[i : i + size]

    def _next(self, loaded: Iterator[Any]) -> list[Record]:
        """The next micro-batch, after taking note of what could not be read for it."""
        try:
            batch = next(loaded)
        except (RuntimeError, OSError, EOFError) as error:
            # An error of the mapper in a worker begins with "Caught".
            if not self._num_workers or str(error).startswith("Caught "):
                raise
            raise UserError(
                "a process that loads images was killed or cannot hand them over "
                f"({str(error) or type(error).__name__}), mostly for want of memory or of shared "
                "memory (/dev/shm): give DATALOADER.NUM_WORKERS a lower number than "
                f"{self._num_workers}"
            ) from error
        samples = unpack(batch) if self._num_workers else batch
        self.unreadable.found(image for _, images in samples for image in images)
        for record, images in samples:
            if record is None:
                self.unreadable.check()
                raise UserError(
                    f"of {counted(len(images), 'training image')} tried one after the other none "
                    f"can be used, the last of them because: {images[-1].reason}"
                )
        return [record for record, _ in samples]


class _MappedSamples(Dataset):
    """Mapped records by :class:`Sample`, each with the images that it took the place of."""

    def __init__(self, records: DatasetFromList, mapper: Mapper, seed: int) -> None:
        self._records = records
        self._mapper = mapper
        self._seed = seed

    def __getitem__(self, sample: Sample) -> tuple[Record | None, list[UnreadableImage]]:
        """The mapped record, or None if there is nothing to take the place of it."""
        unreadable: list[UnreadableImage] = []
        for index in self._candidates(sample):
            record = self._records[index]
            try:
                with _random_state_of(self._seed, sample.position):
                    return self._mapper(record), unreadable
            except UserError as error:
                unreadable.append(UnreadableImage(str(record["file_name"]), str(error)))
        return None, unreadable

    def _candidates(self, sample: Sample) -> Iterator[int]:
        """The record itself, and then others, the same ones for the same position."""
        yield sample.record
        others = permutation(len(self._records), self._seed, _REPLACEMENT, sample.position)
        yield from others[others != sample.record][:_MAX_REPLACEMENTS].tolist()


@contextlib.contextmanager
def _random_state_of(seed: int, position: int) -> Iterator[None]:
    """The global generators seeded for one sample, and afterwards as they were before.

    In a worker they stay as they are: nothing else uses them there.
    """
    states = None
    if get_worker_info() is None:
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    for_python, for_numpy, for_torch = random_words(3, seed, _AUGMENTATION, position).tolist()
    try:
        random.seed(for_python)
        np.random.seed([for_numpy >> 32, for_numpy & 0xFFFFFFFF])
        torch.default_generator.manual_seed(for_torch)  # torch.manual_seed seeds GPUs as well
        yield
    finally:
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])
            torch.set_rng_state(states[2])


@contextlib.contextmanager
def _worker_deaths_wait_for_the_next_batch() -> Iterator[None]:
    """Keep PyTorch from raising an error for a dead worker in the middle of a training step.

    Beginning to iterate, it sets a handler of SIGCHLD that raises it at once, wherever the main
    process is; once in a process, so perhaps for a loader before this one. Without that, the error
    comes when the next batch is asked for.
    """
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextlib.contextmanager
def _no_signals_yet() -> Iterator[None]:
    """Hold back Ctrl-C and SIGTERM, also from workers that begin here, until they are prepared."""
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_main_process(worker: int) -> None:
    """Let the main process decide in a worker's place what Ctrl-C and SIGTERM mean.

    Terminals and job schedulers send them to all processes at once. A worker that ended there and
    then would keep the main process from finishing its step.
    """
    main_process = multiprocessing.parent_process()
    # PyTorch's workers notice when it is gone, but not if it went before they began.
    if main_process is None or not main_process.is_alive():
        os._exit(0)
    # What was inherited is left alone by the garbage collector, and so stays shared memory.
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told_by, args=(main_process.pid,), daemon=True).start()


def _end_when_told_by(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def _micro_batch_size(batch_size: int, world_size: int, accumulate: int) -> int:
    if accumulate < 1:
        raise UserError(f"SOLVER.ACCUMULATE_STEPS is {accumulate}: give 1 or more")
    parts = world_size * accumulate
    if batch_size < 1 or batch_size % parts:
        nearest = max(round(batch_size / parts), 1) * parts
        raise UserError(
            f"SOLVER.IMS_PER_BATCH is {batch_size}: it has to be a multiple of {parts} "
            f"({world_size} processes x SOLVER.ACCUMULATE_STEPS {accumulate}), such as {nearest}"
        )
    return batch_size // parts


def fingerprint(records: list[Record]) -> str:
    """A checksum of the images' names and sizes and of their boxes; folders do not count."""
    digest = hashlib.blake2b(digest_size=16)
    for record in records:
        name = os.path.basename(record["file_name"])
        digest.update(f"{name} {record.get('height')} {record.get('width')}\n".encode())
        boxes = [
            (annotation["category_id"], *annotation["bbox"])
            for annotation in record.get("annotations", ())
        ]
        digest.update(np.array(boxes, dtype="<f8").tobytes())
    return digest.hexdigest()
