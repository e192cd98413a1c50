"""Requests to stop a run of one process; those of several are in test_launch.py."""

import multiprocessing
import os
import signal
import subprocess
import time

import pytest
from torch.utils.data import DataLoader

from ddetr_d2.engine import stopping
from ddetr_d2.engine.stopping import RunStopped, StopRequest, ignore_stop_signals


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


class SlowNumbers:
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[int, int]:
        time.sleep(0.02)
        return index, os.getpid()


def read_while_signals_arrive(queue) -> None:
    """Send all signals to the workers while they read; the data have to come all the same."""
    loader = DataLoader(
        SlowNumbers(),
        batch_size=None,
        num_workers=2,
        worker_init_fn=lambda worker: ignore_stop_signals(),
    )
    with StopRequest():
        seen = []
        for index, worker in loader:
            seen.append(index)
            if index < 2:
                # From another process, as SIGTERM from the main process ends a worker.
                subprocess.run(["kill", "-s", "TERM", str(worker)], check=True)
                os.kill(worker, signal.SIGINT)
                os.kill(worker, signal.SIGUSR1)
    queue.put(seen)


def leave_workers_behind(queue) -> None:
    """End in the middle of the data, as a run that stops does."""
    loader = DataLoader(
        SlowNumbers(),
        batch_size=None,
        num_workers=2,
        persistent_workers=True,
        worker_init_fn=lambda worker: ignore_stop_signals(),
    )
    global iterator
    iterator = iter(loader)
    queue.put(int(next(iterator)[0]))


@pytest.mark.parametrize(
    ("main", "result"),
    [(read_while_signals_arrive, list(range(20))), (leave_workers_behind, 0)],
)
def test_workers_of_a_data_loader(main, result):
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=main, args=(queue,))
    process.start()
    process.join(20)
    assert process.exitcode == 0
    assert queue.get() == result
