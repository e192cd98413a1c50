"""Programs of this project as processes of their own, without the seconds that imports take.

A server process has imported what the programs import, and each run is a fork of it.
"""

import contextlib
import multiprocessing
import os
import random
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.preloaded"])


class Program:
    """A running program.

    Attributes:
        process: the process; signals go to its ``pid``.
    """

    def __init__(self, script: Path, *arguments: str, env: Mapping[str, str] | None = None):
        """
        Args:
            script: the program.
            arguments: of its command line.
            env: additions to the environment.
        """
        self._arguments = [str(script), *arguments]
        self._output = tempfile.TemporaryDirectory()
        self.process = _SERVER.Process(
            target=_run, args=(self._arguments, self._output.name, {**os.environ, **(env or {})})
        )
        self.process.start()

    def text(self, stream: str) -> str:
        """What stands in ``"stdout"`` or ``"stderr"`` so far."""
        path = Path(self._output.name, stream)
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """Wait for the end; a program that takes longer than ``timeout`` seconds is killed."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"{self._arguments}: {self.text('stdout')}{self.text('stderr')}")
        done = subprocess.CompletedProcess(
            self._arguments, self.process.exitcode, self.text("stdout"), self.text("stderr")
        )
        self._output.cleanup()
        return done

    def wait_for(self, path: Path, timeout: float = 60) -> None:
        """Wait until a file is there, or the program has ended."""
        end = time.monotonic() + timeout
        while not path.exists() and self.process.is_alive() and time.monotonic() < end:
            time.sleep(0.005)


def run_program(script: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run a program to its end."""
    return Program(script, *arguments).wait()


def _run(arguments: list[str], output: str, env: dict[str, str]) -> None:
    # As in a program that a user starts; a fork of the server would have its method.
    multiprocessing.set_start_method("fork", force=True)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(ROOT)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(os.path.join(output, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", closefd=False, buffering=1)
    random.seed()  # forks would have the same random numbers
    np.random.seed()
    sys.argv = arguments
    sys.path[0] = os.path.dirname(arguments[0])
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.flush()
