"""Requests to stop a run of one process; those of several are in test_launch.py."""

import multiprocessing
import signal
import time

from ddetr_d2.engine import stopping
from ddetr_d2.engine.stopping import RunStopped, StopRequest

import pytest


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_signal_requests_a_stop(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested()
        signal.raise_signal(number)
        assert stop.requested() and stop.requested()
        assert stop.reason == number.name
    assert signal.getsignal(number) is before


def test_time_limit(monkeypatch):
    monkeypatch.setattr(stopping, "_process_start", time.monotonic() - 3600)
    with StopRequest(max_hours=1.01) as stop:
        assert not stop.requested()
    with StopRequest(max_hours=0.99) as stop:
        assert stop.requested()
        assert stop.reason == "SOLVER.MAX_HOURS 0.99"
    with StopRequest() as stop:
        assert not stop.requested()


def test_run_stopped_is_an_exit_code():
    with pytest.raises(SystemExit) as stopped:
        raise RunStopped
    assert stopped.value.code == 75


def test_same_signal_twice_is_one_request():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.requested()


def test_second_interrupt(monkeypatch):
    monkeypatch.setattr(stopping, "SAME_SIGNAL_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt), StopRequest():
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def terminate_twice() -> None:
    with StopRequest():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)


def test_second_termination(monkeypatch):
    monkeypatch.setattr(stopping, "SAME_SIGNAL_SECONDS", 0)
    process = multiprocessing.get_context("fork").Process(target=terminate_twice)
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGTERM
