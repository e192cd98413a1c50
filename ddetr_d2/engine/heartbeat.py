"""Ends a run of several processes when one of them hangs.

In data-parallel training a process that stops moving leaves all others waiting for its gradients.
Every process therefore publishes how far it is, a few times a minute, in the key-value store
that PyTorch's process groups use, and reads how far the others are. The one that is furthest
behind is the one that hangs, once it has not moved for some time *within a training step*.
Outside of steps (evaluation, checks of the data, checkpoints) one process may work for hours while
the others wait, so there a process only has to be alive.

Time is counted in rounds of the watching thread rather than read from a clock: a run that was
suspended as a whole (Ctrl-Z, ``scontrol suspend``) goes on afterwards.
"""

import collections
import contextlib
import datetime
import json
import os
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Iterator

from torch import distributed as dist

# Hanging processes are found here, so the collectives themselves wait as long as one process may
# reasonably work alone.
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=6)
# Seconds without progress; together with finding out and ending the others below a minute.
STEP_LIMIT = 35.0
# The first steps compile, tune and start the data workers.
FIRST_STEPS_LIMIT = 600.0
# Seconds outside of steps in which no thread of a process runs: nothing that works does that.
SILENCE_LIMIT = 1800.0
EXIT_HUNG = os.EX_SOFTWARE  # 70


class Heartbeat:
    """Publishes this process's progress and watches that of all others.

    Args:
        store: store that all processes share; a connection of its own is opened.
        rank: this process, of ``world_size``.
        step_limit: seconds without progress in a step after which a process counts as hanging. Ten
            times the usual duration of a step is allowed in any case, and
            :data:`FIRST_STEPS_LIMIT` in the first two steps.
        first_steps_limit: seconds, in place of :data:`FIRST_STEPS_LIMIT`.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        step_limit: float = STEP_LIMIT,
        first_steps_limit: float = FIRST_STEPS_LIMIT,
    ) -> None:
        self._store = dist.PrefixStore("heartbeat", store.clone())
        self._rank = rank
        self._world_size = world_size
        self._step_limit = step_limit
        self._first_steps_limit = first_steps_limit
        self._interval = min(2.0, step_limit / 10)
        self._durations: collections.deque[float] = collections.deque(maxlen=20)
        self._beats = 0  # how far the main thread is
        self._in_step = False
        self._rounds = 0  # of the watching thread
        self._rounds_since_beat = 0
        self._rounds_unanswered = 0
        # Of each process: its last state, and the rounds since it changed.
        self._seen: list[tuple[list, int]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._publish()

    def wait_for_all(self, timeout: float) -> list[int]:
        """Wait until all processes are there; returns the ranks of those missing in the end."""
        end = time.monotonic() + timeout
        missing = list(range(self._world_size))
        while missing and time.monotonic() < end:
            missing = [rank for rank in missing if not self._store.check([str(rank)])]
            if missing:
                time.sleep(0.1)
        return missing

    def start(self) -> None:
        """Begin to watch; all processes have to be there."""
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()

    def beat(self) -> None:
        """Progress: the main thread got further."""
        self._beats += 1
        self._rounds_since_beat = 0

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A training step, in which this process may not stand still for long."""
        began = time.monotonic()
        self._enter(in_step=True)
        try:
            yield
        finally:
            self._enter(in_step=False)
        self._durations.append(time.monotonic() - began)

    def _enter(self, in_step: bool) -> None:
        self._in_step = in_step
        self.beat()
        # At once, so that the others know it even if this process freezes now.
        with contextlib.suppress(RuntimeError):  # a lost connection is the watching thread's affair
            self._publish()

    def _limit(self) -> int:
        """Rounds that this process may go without progress now."""
        if not self._in_step:
            seconds = SILENCE_LIMIT
        elif len(self._durations) < 2:
            seconds = max(self._first_steps_limit, self._step_limit)
        else:
            seconds = max(self._step_limit, 10 * statistics.median(self._durations))
        return round(seconds / self._interval)

    def _publish(self) -> None:
        late = self._in_step and self._rounds_since_beat > self._limit()
        state = [self._rounds, self._beats, late, self._limit()]
        self._store.set(str(self._rank), json.dumps(state))

    def _exchange(self) -> None:
        try:
            self._publish()
            answer = self._store.multi_get([str(rank) for rank in range(self._world_size)])
        except RuntimeError:  # the connection is lost; the watching thread counts its rounds
            return
        states = [json.loads(state) for state in answer]
        old = self._seen or [(state, 0) for state in states]
        self._seen = [
            (state, 0 if state[0] != before[0] else rounds + 1)
            for state, (before, rounds) in zip(states, old, strict=True)
        ]
        self._rounds_unanswered = 0

    def _watch(self) -> None:
        exchange = None
        while not self._ended.wait(self._interval):
            self._rounds += 1
            self._rounds_since_beat += 1
            self._rounds_unanswered += 1
            # In a thread of its own, because nothing interrupts a store that does not answer.
            if exchange is None or not exchange.is_alive():
                exchange = threading.Thread(target=self._exchange, daemon=True)
                exchange.start()
            if self._rounds_unanswered > self._limit():
                self._end_run(
                    "the process that started the run, or that of rank 0, no longer answers"
                )
            hanging = self._hanging()
            if hanging:
                ranks = ", ".join(map(str, hanging))
                self._end_run(
                    f"rank {ranks} of {self._world_size} hangs: no progress in a training step for "
                    f"{self._seen[hanging[0]][0][3] * self._interval:.0f} s; the run was ended",
                    hanging,
                )

    def _hanging(self) -> list[int]:
        """The processes furthest behind, if all of them are late; the others wait for them."""
        if not self._seen:
            return []
        furthest_behind = min(state[1] for state, _ in self._seen)
        behind, frozen = [], []
        for rank, ((_, beats, late, limit), silent) in enumerate(self._seen):
            if beats == furthest_behind:
                if not late and silent <= limit:
                    return []
                behind.append(rank)
                if silent > 2:  # not even its watching thread runs
                    frozen.append(rank)
        return frozen or behind

    def _end_run(self, message: str, hanging: list[int] | None = None) -> None:
        if self._ended.is_set():
            return
        if hanging and self._rank in hanging:
            print(f"rank {self._rank} stands at:", file=sys.stderr)
            traceback.print_stack(sys._current_frames()[threading.main_thread().ident])
            sys.stderr.flush()
        with contextlib.suppress(RuntimeError):
            if hanging and self._store.add("reported", 1) > 1:
                message = ""  # another process has said so
        if message:
            print(f"error: {message}.", file=sys.stderr, flush=True)
        time.sleep(2 * self._interval)  # the hanging process prints where it stands
        os._exit(EXIT_HUNG)  # the main thread may be beyond the reach of an exception


_running: Heartbeat | None = None


def set_heartbeat(heartbeat: Heartbeat | None) -> None:
    """Make ``heartbeat`` the one that :func:`step` and :func:`beat` of this process move."""
    global _running
    _running = heartbeat


def step() -> contextlib.AbstractContextManager[None]:
    """A training step; nothing in a run of one process."""
    return _running.step() if _running else contextlib.nullcontext()


def beat() -> None:
    """Progress within a step, after which the other processes may have to be waited for.

    Of two processes in the same step, the one with fewer beats is taken for the one that hangs.
    """
    if _running:
        _running.beat()
