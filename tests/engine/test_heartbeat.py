"""Hanging processes are told apart from those that work for long."""

import os
import signal
import time

import pytest
from detectron2.utils import comm

from ddetr_d2.engine import heartbeat

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


def rank_0_works_alone(args) -> None:
    for _ in range(3):
        with heartbeat.step():
            comm.synchronize()
    if comm.get_rank() == 0:  # as in evaluation
        time.sleep(1.5)
    with heartbeat.step():
        comm.synchronize()


def test_long_work_outside_of_steps_is_not_taken_for_hanging(run):
    started = run(rank_0_works_alone, "--hang-limit", "0.5")
    assert started.exit_code() == 0, started.log()


def long_steps(args) -> None:
    for seconds in (0.3, 0.3, 0.3, 2):
        with heartbeat.step():
            time.sleep(seconds)


def test_limit_grows_with_the_duration_of_steps(run):
    started = run(long_steps, "--hang-limit", "0.5")
    assert started.exit_code() == 0, started.log()
