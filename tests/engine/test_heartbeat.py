"""Hanging processes are told apart from those that work for long."""

import os
import signal
import time
from pathlib import Path

from ddetr_d2.engine import heartbeat

import pytest
from detectron2.utils import comm

from .conftest import TIME_LIMIT


def train(args, how_rank_1_hangs) -> None:
    for number in range(4):
        with heartbeat.step():
            heartbeat.beat()
            if number == 3 and comm.get_rank() == 1:
                how_rank_1_hangs()
            heartbeat.beat()
            comm.synchronize()


def rank_1_sleeps(args) -> None:
    train(args, lambda: time.sleep(TIME_LIMIT))


def rank_1_freezes(args) -> None:
    train(args, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def rank_1_freezes_without_beats(args) -> None:
    for number in range(4):
        with heartbeat.step():
            if number == 3 and comm.get_rank() == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            comm.synchronize()


@pytest.mark.parametrize("main", [rank_1_sleeps, rank_1_freezes, rank_1_freezes_without_beats])
def test_hanging_process_ends_all(run, main):
    started = run(main, "--hang-limit", "1")
    assert started.exit_code() == heartbeat.EXIT_HUNG
    assert started.log().count("error: ") == 1
    assert "error: rank 1 of 2 hangs: no progress in a training step for 1 s" in started.log()
    if main is rank_1_sleeps:
        assert "rank 1 stands at:" in started.log() and "in rank_1_sleeps" in started.log()


def busy(seconds) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def rank_0_alone(how) -> None:
    """Two steps, something that rank 0 does and the other waits for, and a step."""
    for _ in range(2):
        with heartbeat.step():
            comm.synchronize()
    if comm.get_rank() == 0:
        how()
    comm.synchronize()
    with heartbeat.step():
        comm.synchronize()


def rank_0_computes(args) -> None:
    rank_0_alone(lambda: busy(1.5))


def rank_0_waits_for_a_disk(args) -> None:
    def write() -> None:
        with heartbeat.writing():
            time.sleep(1.5)

    rank_0_alone(write)


@pytest.mark.parametrize("main", [rank_0_computes, rank_0_waits_for_a_disk])
def test_work_outside_of_steps_is_not_taken_for_hanging(run, main):
    started = run(main, "--hang-limit", "0.5")
    assert started.exit_code() == 0, started.log()


def rank_0_sleeps(args) -> None:
    rank_0_alone(lambda: time.sleep(TIME_LIMIT))


def rank_0_freezes(args) -> None:
    rank_0_alone(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def rank_0_never_ends_writing(args) -> None:
    def write() -> None:
        with heartbeat.writing():
            time.sleep(TIME_LIMIT)

    rank_0_alone(write)


@pytest.mark.parametrize(
    ("main", "what"),
    [(rank_0_sleeps, ""), (rank_0_freezes, ""), (rank_0_never_ends_writing, "while a file was ")],
)
def test_hanging_outside_of_steps_ends_all(run, monkeypatch, main, what):
    monkeypatch.setattr(heartbeat, "SILENCE_LIMIT", 1)
    monkeypatch.setattr(heartbeat, "WRITING_LIMIT", 1)
    started = run(main, "--hang-limit", "1")
    assert started.exit_code() == heartbeat.EXIT_HUNG
    assert started.log().count("error: ") == 1
    assert f"error: rank 0 of 2 hangs: no progress {what}" in started.log()
    assert main is rank_0_freezes or f"in {main.__name__}" in started.log()


def test_a_silent_process_may_be_reading_a_large_file(run, tmp_path):
    """Which keeps all of its threads from running, for a while."""
    started = run(rank_0_freezes_for_a_while, "--hang-limit", "0.5")
    started.wait_for_files("pid")
    time.sleep(2)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGCONT)
    assert started.exit_code() == 0, started.log()


def rank_0_freezes_for_a_while(args) -> None:
    def freeze() -> None:
        path = Path(args.opts[0], "pid")
        path.with_suffix(".new").write_text(str(os.getpid()))
        path.with_suffix(".new").rename(path)
        os.kill(os.getpid(), signal.SIGSTOP)

    rank_0_alone(freeze)


def evaluate(args, batches, seconds) -> None:
    for _ in range(2):
        with heartbeat.step():
            comm.synchronize()
    for number in heartbeat.EvaluatedBatches(range(batches[comm.get_rank()])):
        time.sleep(seconds if comm.get_rank() == 0 and number == 1 else 0.2)
    comm.synchronize()


def different_numbers_of_batches(args) -> None:
    evaluate(args, (10, 2), 0.2)


def rank_0_hangs_in_a_batch(args) -> None:
    evaluate(args, (2, 3), TIME_LIMIT)


def test_batches_of_an_evaluation_are_progress(run):
    started = run(different_numbers_of_batches, "--hang-limit", "1")
    assert started.exit_code() == 0, started.log()


def test_hanging_in_an_evaluation_ends_all(run):
    started = run(rank_0_hangs_in_a_batch, "--hang-limit", "1")
    assert started.exit_code() == heartbeat.EXIT_HUNG
    assert "error: rank 0 of 2 hangs: no progress in an evaluation for 1 s" in started.log()


def long_steps(args) -> None:
    for seconds in (0.3, 0.3, 0.3, 2):
        with heartbeat.step():
            time.sleep(seconds)


def test_limit_grows_with_the_duration_of_steps(run):
    started = run(long_steps, "--hang-limit", "0.5")
    assert started.exit_code() == 0, started.log()
