"""Stopping a training run in order to resume it: signals and the time limit."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from detectron2.utils import comm
from torch import distributed as dist

from .heartbeat import COLLECTIVE_TIMEOUT

EXIT_RESUME = os.EX_TEMPFAIL  # 75: nothing is wrong, start the same command with --resume
# A signal may arrive twice, from the terminal or Slurm and once more from the launching process.
SAME_SIGNAL_SECONDS = 1.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

_process_start = time.monotonic()


class RunStopped(SystemExit):
    """The run has saved its state and ends with the exit code that says "resume me"."""

    def __init__(self) -> None:
        super().__init__(EXIT_RESUME)


class StopRequest:
    """Notices SIGTERM, SIGINT (Ctrl-C), SIGUSR1 and the end of ``max_hours`` between steps.

    ::

        with StopRequest(cfg.SOLVER.MAX_HOURS) as stop:
            for batch in batches:
                ...
                if stop.requested():  # in all processes alike
                    save_checkpoint()
                    raise RunStopped

    A second SIGTERM or SIGINT, at least :data:`SAME_SIGNAL_SECONDS` after the first, ends the
    process at once. SIGUSR1 is what Slurm sends ahead of its time limit
    (``sbatch --signal=USR1@120``); however often it comes, it only requests a stop.

    Signal handlers are in place inside the ``with`` block, and only if it is entered in the main
    thread. All processes have to enter it together.

    Args:
        max_hours: hours after the start of the program at which to stop; 0 for no limit. The clock
            of the main process decides.
    """

    def __init__(self, max_hours: float = 0.0) -> None:
        self._max_hours = max_hours
        self._signal = 0
        self._first_signal_time: float | None = None
        self._previous: dict[signal.Signals, Any] = {}  # handlers
        self._group: dist.ProcessGroup | None = None
        self.reason = ""

    def __enter__(self) -> "StopRequest":
        if comm.get_world_size() > 1:
            # On the CPU, so that no step waits for a GPU.
            self._group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def requested(self) -> bool:
        """Whether to stop now; every process has to ask after each step, and all get one answer.

        Afterwards :attr:`reason` names the signal or the time limit, for the log.
        """
        if not self.reason:
            request = self._signal
            if comm.is_main_process() and self._time_is_up():
                request = request or signal.NSIG  # beyond all signals
            request = self._largest_of_all(request)
            if request == signal.NSIG:
                self.reason = f"SOLVER.MAX_HOURS {self._max_hours:g}"
            elif request:
                self.reason = signal.Signals(request).name
        return bool(self.reason)

    def _time_is_up(self) -> bool:
        hours = (time.monotonic() - _process_start) / 3600
        return 0 < self._max_hours <= hours

    def _largest_of_all(self, number: int) -> int:
        if self._group is None:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group)
        return int(numbers)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number != signal.SIGUSR1:
            if self._first_signal_time is None:
                self._first_signal_time = now
                if comm.is_main_process():  # print() must not be used in a signal handler
                    os.write(2, b"\nStopping after this step; once more to stop at once.\n")
            elif now - self._first_signal_time > SAME_SIGNAL_SECONDS:
                signal.signal(
                    number,
                    signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL,
                )
                signal.raise_signal(number)
        self._signal = self._signal or number
