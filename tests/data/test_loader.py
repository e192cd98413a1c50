"""The training loader: the same images at the same step, whatever loads them; bad images."""

import gc
import itertools
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import time

from ddetr_d2.data import DetrDatasetMapper
from ddetr_d2.data.loader import TrainLoader, build_train_loader, fingerprint
from ddetr_d2.errors import UserError

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import get_worker_info

SIZES = [(40, 30), (30, 40), (36, 36), (44, 20), (20, 44), (50, 30), (32, 30)]  # 4 are wide


@pytest.fixture
def records(tmp_path) -> list[dict]:
    """Seven images with a box each."""
    rng = np.random.default_rng(0)
    records = []
    for i, (width, height) in enumerate(SIZES):
        path = tmp_path / "images" / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        box = {"bbox": [2, 3, 10 + i, 12], "bbox_mode": 1, "category_id": i % 2, "iscrowd": 0}
        records.append(
            {
                "file_name": str(path),
                "image_id": i,
                "width": width,
                "height": height,
                "annotations": [box],
            }
        )
    return records


@pytest.fixture
def cfg(cfg):
    """Every kind of random augmentation, on small images."""
    cfg.INPUT.MIN_SIZE_TRAIN = (16, 24, 32)
    cfg.INPUT.MAX_SIZE_TRAIN = 60
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE = "absolute_range"
    cfg.INPUT.CROP.SIZE = [10, 20]
    cfg.INPUT.CROP.MIN_SIZE_TRAIN = (20, 25)
    cfg.SOLVER.ACCUMULATE_STEPS = 1
    cfg.DATALOADER.MAX_UNREADABLE = 0.01
    return cfg


@pytest.fixture
def mapper(cfg):
    return DetrDatasetMapper(cfg, is_train=True)


@pytest.fixture
def loader(records, mapper):
    """Makes a loader of the images with the arguments given."""

    def make(**kwargs) -> TrainLoader:
        return TrainLoader(records, mapper, **{"batch_size": 2, "seed": 5, **kwargs})

    return make


def steps(loader: TrainLoader, count: int) -> list[list[list[dict]]]:
    return list(itertools.islice(loader, count))


def content(micro_batches: list[list[dict]]) -> list[tuple]:
    """The images of a step or of a micro-batch, comparable with ==."""
    return [
        (
            image["image_id"],
            image["image"].shape,
            image["image"].numpy().tobytes(),
            image["instances"].gt_boxes.tensor.tolist(),
            image["instances"].gt_classes.tolist(),
        )
        for micro_batch in micro_batches
        for image in micro_batch
    ]


def ids(micro_batches: list[list[dict]]) -> list[int]:
    return [image["image_id"] for micro_batch in micro_batches for image in micro_batch]


def test_same_images_for_any_number_of_workers(loader):
    expected = [content(step) for step in steps(loader(), 9)]  # three epochs of three batches
    for workers in (1, 3):
        assert [content(step) for step in steps(loader(num_workers=workers), 9)] == expected
    assert [content(step) for step in steps(loader(seed=6), 9)] != expected


def test_an_image_is_augmented_differently_each_time(loader):
    """In twelve epochs no two views of an image are the same by mistake."""
    views = [view for step in steps(loader(batch_size=7), 12) for view in content(step)]
    first = [view for view in views if view[0] == 0]
    assert len(first) == 12
    assert len({view[2] for view in first}) > 6


@pytest.mark.parametrize("grouping", [False, True])
def test_continues_at_every_step(loader, grouping):
    expected = [content(step) for step in steps(loader(aspect_ratio_grouping=grouping), 10)]
    for step in range(10):
        resumed = loader(aspect_ratio_grouping=grouping, seed=1)  # the seed comes from the state
        resumed.load_state_dict(loader(aspect_ratio_grouping=grouping).state_dict(step))
        assert content(next(iter(resumed))) == expected[step]


def test_workers_load_ahead_of_the_state(loader):
    """The state is that of the step the caller has come to, not of what workers have drawn."""
    expected = [content(step) for step in steps(loader(), 6)]
    ahead = loader(num_workers=3)
    handed_out = steps(ahead, 2)
    resumed = loader(num_workers=1)
    resumed.load_state_dict(ahead.state_dict(len(handed_out)))
    assert [content(step) for step in steps(resumed, 4)] == expected[2:]


@pytest.mark.parametrize("grouping", [False, True])
def test_processes_and_micro_batches_share_the_same_batch(loader, grouping):
    """1 x 4, 2 x 2 and 4 x 1 images, and in micro-batches; also continued by another number."""

    def run(world_size: int, accumulate: int, first: int = 0) -> list[list[tuple]]:
        parts = []
        for rank in range(world_size):
            part = loader(
                batch_size=4,
                world_size=world_size,
                rank=rank,
                accumulate=accumulate,
                aspect_ratio_grouping=grouping,
            )
            part.start_from(first)
            part = steps(part, 6 - first)
            size = 4 // world_size // accumulate
            assert all(len(micro) == size for step in part for micro in step)
            assert all(len(step) == accumulate for step in part)
            parts.append(part)
        return [[image for part in step for image in content(part)] for step in zip(*parts)]  # noqa: B905

    expected = run(1, 1)
    for world_size, accumulate in ((2, 1), (4, 1), (1, 4), (1, 2), (2, 2)):
        assert run(world_size, accumulate) == expected
    assert run(4, 1, first=3) == expected[3:]


def test_generators_of_the_main_process_are_left_alone(loader):
    for workers in (0, 1):
        states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
        steps(loader(num_workers=workers), 4)
        assert random.getstate() == states[0]
        assert np.random.get_state()[1].tolist() == states[1]
        assert torch.equal(torch.get_rng_state(), states[2])


@pytest.mark.parametrize("library", ["random", "numpy", "torch"])
def test_all_generators_are_a_sample_s_own(records, library):
    """Whatever numbers a mapper draws, and from whichever library, they belong to the position."""
    draw = {
        "random": random.random,
        "numpy": np.random.random,
        "torch": lambda: torch.rand(()).item(),
    }[library]

    def run(first: int) -> list[float]:
        loader = TrainLoader(records, lambda record: draw(), batch_size=2, seed=5)
        loader.start_from(first)
        return [value for [batch] in steps(loader, 5 - first) for value in batch]

    drawn = run(0)
    assert len({*drawn}) == 10
    assert run(3) == drawn[6:]


def test_configuration(cfg, records, mapper, tmp_path):
    cfg.OUTPUT_DIR = str(tmp_path / "out")
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.ACCUMULATE_STEPS = 2
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = True
    [step] = steps(build_train_loader(cfg, records, mapper, seed=0), 1)
    assert [len(micro_batch) for micro_batch in step] == [2, 2]
    assert {*ids(step)} in ({0, 3, 5, 6}, {1, 2, 4})

    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 4.0  # every image twice at least
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    cfg.SOLVER.IMS_PER_BATCH = 14
    [step] = steps(build_train_loader(cfg, records, mapper, seed=0), 1)
    assert len({*ids(step)}) < 14
    cfg.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    with pytest.raises(UserError, match="expected one of TrainingSampler, RepeatFactorTrain"):
        build_train_loader(cfg, records, mapper, seed=0)


def test_wrong_numbers_are_named(loader, records, mapper):
    with pytest.raises(UserError, match="IMS_PER_BATCH is 6: .* multiple of 4 .*such as 8"):
        loader(batch_size=6, world_size=2, accumulate=2)
    with pytest.raises(UserError, match="ACCUMULATE_STEPS is 0"):
        loader(accumulate=0)
    with pytest.raises(UserError, match="NUM_WORKERS is -1"):
        loader(num_workers=-1)
    with pytest.raises(UserError, match="MAX_UNREADABLE is 3"):
        loader(max_unreadable=3)
    with pytest.raises(UserError, match="no images"):
        TrainLoader([], mapper, batch_size=1, seed=0)
    del records[2]["width"]
    with pytest.raises(UserError, match="no width and height of image .*2.png"):
        loader(aspect_ratio_grouping=True)


def test_resuming_with_another_data_set(loader, records, caplog):
    state = loader().state_dict(3)
    records[0]["file_name"] = records[0]["file_name"].replace("images", "moved")
    loader().load_state_dict(state)  # the same data set in another folder
    assert not caplog.records
    records[0]["annotations"][0]["bbox"][0] += 1
    loader(batch_size=7).load_state_dict(state)
    assert "the annotations and SOLVER.IMS_PER_BATCH changed" in caplog.text
    records.pop()
    with pytest.raises(UserError, match="started on 7 training images, and now there are 6"):
        loader().load_state_dict(state)


def test_fingerprint_does_not_depend_on_the_process(records):
    assert fingerprint(records) == fingerprint([dict(record) for record in records])
    records[1], records[2] = records[2], records[1]
    assert fingerprint(records) != fingerprint(records[::-1])


# Images that cannot be used.


@pytest.fixture
def damaged(records) -> list[dict]:
    """Image 2 is gone and image 4 has another size than annotated."""
    os.remove(records[2]["file_name"])
    Image.new("RGB", (9, 9)).save(records[4]["file_name"])
    return records


def agree_alone(loader: TrainLoader) -> None:
    loader.unreadable.agree(lambda own: [own])


def test_another_image_takes_the_place(loader, damaged, tmp_path, caplog):
    expected = None
    for workers in (0, 1, 3):
        caplog.clear()
        file = tmp_path / f"{workers}" / "unreadable.txt"
        one = loader(num_workers=workers, max_unreadable=0.5, unreadable_file=file)
        with caplog.at_level(logging.WARNING):
            run = steps(one, 12)  # four epochs
        agree_alone(one)
        assert all(len(micro_batch) == 2 for [micro_batch] in run)
        assert not {2, 4} & {image_id for step in run for image_id in ids(step)}
        expected = expected or [content(step) for step in run]
        assert [content(step) for step in run] == expected
        # Each is counted, logged and listed once, though it came up in every epoch.
        assert len(one.unreadable) == 2
        for record in (damaged[2], damaged[4]):
            assert sum(record["file_name"] in r.getMessage() for r in caplog.records) == 1
        assert len(caplog.records) == 2
        listed = dict(line.split("\t") for line in file.read_text().splitlines())
        assert listed.keys() == {damaged[2]["file_name"], damaged[4]["file_name"]}
        assert "does not exist" in listed[damaged[2]["file_name"]]
        assert "has 9 x 9 pixels" in listed[damaged[4]["file_name"]]


def test_good_images_are_not_disturbed(loader, records):
    """Where nothing is wrong, the samples are those of the intact data set."""
    intact = [content(step)[i] for step in steps(loader(), 9) for i in range(2)]
    os.remove(records[2]["file_name"])
    damaged = [content(step)[i] for step in steps(loader(), 9) for i in range(2)]
    assert [a == b for a, b in zip(intact, damaged, strict=True)] == [a[0] != 2 for a in intact]


def test_the_list_goes_on_after_resuming(loader, damaged, tmp_path):
    file = tmp_path / "unreadable.txt"
    file.write_text("of an earlier run\treason\n")

    def run(first: int, last: int, state: dict | None) -> dict:
        one = loader(max_unreadable=0.5, unreadable_file=file)
        if state:
            one.load_state_dict(state)
        steps(one, last - first)
        return one.state_dict(last)

    reference = run(0, 12, None)
    expected = file.read_text()
    assert len(expected.splitlines()) == 2
    state = run(0, 5, None)
    assert run(5, 6, state)["unreadable"] == state["unreadable"] == reference["unreadable"]
    run(5, 12, state)  # what this one adds is lost with its checkpoint
    assert run(5, 12, state) == reference
    assert file.read_text() == expected


def test_too_many_stop_the_run(loader, damaged, tmp_path):
    file = tmp_path / "unreadable.txt"
    one = loader(unreadable_file=file)  # 1% of seven images: one is tolerated
    with pytest.raises(UserError) as error:
        for _ in one:
            agree_alone(one)
    assert "2 of the 7 training images cannot be used" in str(error.value)
    assert "DATALOADER.MAX_UNREADABLE (0.01) allows 1" in str(error.value)
    assert damaged[2]["file_name"] in str(error.value)
    assert len(file.read_text().splitlines()) == 2

    none = loader(max_unreadable=0.0)
    with pytest.raises(UserError, match=r"DATALOADER.MAX_UNREADABLE \(0\) allows 0"):
        for _ in none:
            agree_alone(none)


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_can_be_read(loader, records, workers):
    for record in records:
        os.remove(record["file_name"])
    with pytest.raises(UserError, match="7 of the 7 training images cannot be used"):
        steps(loader(num_workers=workers), 1)
    with pytest.raises(UserError, match="of 7 training images tried one after the other none"):
        steps(loader(num_workers=workers, max_unreadable=1.0), 1)


def test_defects_are_not_taken_for_bad_images(records):
    def mapper(record: dict) -> dict:
        raise OSError("a defect")

    before = {*multiprocessing.active_children()}
    for workers in (0, 1):
        with pytest.raises(OSError, match="a defect"):
            steps(TrainLoader(records, mapper, batch_size=2, seed=0, num_workers=workers), 1)
    for worker in {*multiprocessing.active_children()} - before:
        worker.kill()  # PyTorch would wait for it for five seconds


# Workers.


@pytest.mark.parametrize("delay", [0, 1])
def test_workers_leave_signals_to_the_main_process(loader, monkeypatch, delay):
    """Ctrl-C and SIGTERM from outside reach all processes; the main one finishes its step.

    The second worker may still be starting then.
    """
    monkeypatch.setattr(gc, "freeze", lambda: time.sleep(delay * get_worker_info().id))
    expected = [content(step) for step in steps(loader(), 8)]
    before = {*multiprocessing.active_children()}
    run = iter(loader(num_workers=2))
    got = [content(next(run))]
    workers = {*multiprocessing.active_children()} - before
    assert len(workers) == 2
    for worker in workers:
        subprocess.run(["kill", "-INT", str(worker.pid)], check=True)
        subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    got += [content(next(run)) for _ in range(7)]
    assert got == expected
    for worker in workers:  # as PyTorch and Python do at the end of the main process
        worker.terminate()
        worker.join(5)
        assert worker.exitcode == 0


def test_workers_end_with_the_iteration(loader):
    before = {*multiprocessing.active_children()}
    run = iter(loader(num_workers=2))
    next(run)
    workers = {*multiprocessing.active_children()} - before
    run.close()
    for worker in workers:
        worker.join(4)
        assert worker.exitcode == 0


def test_a_killed_worker_ends_the_run(loader):
    """When the next batch is asked for, not in the middle of a step."""
    before = {*multiprocessing.active_children()}
    run = iter(loader(num_workers=1))
    next(run)
    [worker] = {*multiprocessing.active_children()} - before
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.2)  # as in a training step
    with pytest.raises(UserError, match="was killed or cannot .* lower number than 1"):
        next(run)
        next(run)
        next(run)
