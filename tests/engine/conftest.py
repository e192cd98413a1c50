"""Runs of two real processes, for tests of what happens to them."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from ddetr_d2.engine import launch as launching
from ddetr_d2.engine.launch import launch
from ddetr_d2.engine.layout import launch_argument_parser

import pytest

TIME_LIMIT = 60  # seconds, for any run here on a busy machine


class Run:
    """``launch(main, ...)`` with two processes in a session of its own.

    They are forked, so that none of them has to import PyTorch again. ``main`` finds the path of
    a folder in ``args.opts[0]``.
    """

    def __init__(self, main, folder: Path, *arguments: str) -> None:
        self.folder = folder
        args = launch_argument_parser().parse_args(
            ["--num-processes", "2", *arguments, str(folder)]
        )
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=self._launch, args=(main, args))
        self.process.start()

    def _launch(self, main, args) -> None:
        os.setsid()
        log = os.open(self.folder / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        launch(main, args, start_method="fork")

    def wait_for_files(self, *names: str) -> None:
        end = time.monotonic() + TIME_LIMIT
        while not all((self.folder / name).exists() for name in names):
            assert self.process.is_alive() and time.monotonic() < end, self.log()
            time.sleep(0.02)

    def exit_code(self) -> int:
        self.process.join(TIME_LIMIT)
        assert self.process.exitcode is not None, f"still running: {self.log()}"
        assert not self.processes(), "a process is left over"
        return self.process.exitcode

    def processes(self) -> list[int]:
        """Those of the session that are still alive."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            except OSError:  # it has just ended
                continue
            if int(session) == self.process.pid and state != "Z":
                found.append(int(stat.parent.name))
        return found

    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "GRACE", 1)
    runs = []

    def start(main, *arguments: str) -> Run:
        runs.append(Run(main, tmp_path, *arguments))
        return runs[-1]

    yield start
    for started in runs:
        for pid in started.processes():
            os.kill(pid, signal.SIGKILL)
        started.process.join()
