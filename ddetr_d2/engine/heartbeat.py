"""Ends a run of several processes when one of them hangs.

In data-parallel training a process that stops moving leaves all others waiting for its gradients.
Every process therefore publishes how far it is, a few times a minute, in the key-value store
that PyTorch's process groups use, and reads how far the others are. Of those furthest behind, the
ones that do not wait for the others in a collective operation are the ones that hang, once they
have made no progress for some time. What counts as progress:

- in a training step (:func:`step`): its stations (:func:`beat`);
- in an evaluation (:class:`EvaluatedBatches`): each batch;
- while files are written (:func:`writing`): that the main thread computes at all; a disk may be
  waited for;
- elsewhere (data sets are read and checked, the model is built, AP is computed): the same.

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
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from torch import distributed as dist
from torch.distributed import distributed_c10d

# Hanging processes are found here, so the collectives themselves wait as long as one process may
# reasonably work alone.
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=6)
# Seconds without progress; together with finding out and ending the others below a minute.
STEP_LIMIT = 35.0
# The first steps compile, tune and start the data workers.
FIRST_STEPS_LIMIT = 600.0
# Network file systems stand still for minutes, and a run is not worth less than its checkpoint.
WRITING_LIMIT = 600.0
# Outside of steps and evaluations a single call of C code may keep all threads of a process from
# running, as the parsing of a large annotation file does.
SILENCE_LIMIT = 1800.0
# Seconds of the main thread's processor time in a round that count as progress: more than it takes
# to look again and again whether something has come. Other threads never rest, NCCL's for example.
BUSY_SECONDS = 0.0005
EXIT_HUNG = os.EX_SOFTWARE  # 70


class _State(NamedTuple):
    """What a process publishes.

    Attributes:
        round: of its watching thread; stands still if the process is frozen or dead.
        beats: how far its main thread is; the same in all processes at the same place.
        late: it has made no progress for longer than it may.
        limit: rounds that it may go without progress.
        silence: rounds in which nothing may be heard of it.
        waits: its main thread is in a collective operation.
        what: what it does, for messages.
    """

    round: int
    beats: int
    late: bool
    limit: int
    silence: int
    waits: bool
    what: str


class _Work:
    """A kind of work, and how long a process may go without progress in it.

    Args:
        what: for messages: "no progress (what) for 35 s".
        limit: seconds without progress.
        silence: seconds in which no thread of the process runs.
        busy_counts: processor time is progress.
    """

    def __init__(self, what: str, limit: float, silence: float, *, busy_counts: bool = True):
        self.what = what
        self.busy_counts = busy_counts
        self._limits = limit, silence

    def limits(self) -> tuple[float, float]:
        """Seconds without progress, and seconds without any sign."""
        return self._limits


class _PacedWork(_Work):
    """Work in units of about the same duration. Ten times the usual one is allowed in any case.

    Args:
        what: for messages.
        limit: seconds without progress.
        like: work that is as quick, to go by as long as there are no units of this one.
    """

    def __init__(self, what: str, limit: float, like: "_PacedWork | None" = None):
        super().__init__(what, limit, limit, busy_counts=False)
        self._limit = limit
        self._like = like
        self.durations: collections.deque[float] = collections.deque(maxlen=20)

    def limits(self) -> tuple[float, float]:
        if len(self.durations) >= 2:
            seconds = max(self._limit, 10 * statistics.median(self.durations))
        elif self._like:
            return self._like.limits()
        else:
            seconds = max(self._limit, FIRST_STEPS_LIMIT)
        return seconds, seconds


class Heartbeat:
    """Publishes this process's progress and watches that of all others.

    Args:
        store: store that all processes share; a connection of its own is opened.
        rank: this process, of ``world_size``.
        step_limit: seconds without progress after which a process counts as hanging. Steps and
            batches may take longer, see :class:`_PacedWork`, and so may the writing of files.
    """

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, step_limit: float = STEP_LIMIT
    ) -> None:
        # PyTorch's stubs lack it.
        own = store.clone()  # type: ignore[attr-defined]
        self._store = dist.PrefixStore("heartbeat", own)
        self._rank = rank
        self._world_size = world_size
        self._interval = min(2.0, step_limit / 10)
        self._step = _PacedWork("in a training step ", step_limit)
        self._evaluation = _PacedWork("in an evaluation ", step_limit, like=self._step)
        self._writing = _Work(
            "while a file was written ", max(step_limit, WRITING_LIMIT), WRITING_LIMIT
        )
        self._work = _Work("", step_limit, SILENCE_LIMIT)
        main_thread = threading.main_thread().ident
        assert main_thread is not None  # it has been started
        self._main_thread = main_thread
        self._beats = 0  # how far the main thread is
        self._rounds = 0  # of the watching thread
        self._rounds_since_progress = 0
        self._rounds_unanswered = 0
        self._clock = time.pthread_getcpuclockid(self._main_thread)
        self._busy_before = 0.0  # processor time of the main thread until the last round
        # Of each process: its last state, and the rounds since it changed.
        self._seen: list[tuple[_State, int]] = []
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

    def progress(self) -> None:
        """The main thread got further; where it is in the run says nothing about the others."""
        self._rounds_since_progress = 0

    def beat(self) -> None:
        """The main thread got further, to where all processes come."""
        self._beats += 1
        self.progress()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """A training step, in which this process may not stand still for long."""
        began = time.monotonic()
        with self._doing(self._step, together=True):
            yield
        self._step.durations.append(time.monotonic() - began)

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """Batches that are evaluated, each followed by :meth:`evaluated`.

        Processes may have different numbers of them.
        """
        with self._doing(self._evaluation, together=True):
            yield

    def evaluated(self, seconds: float) -> None:
        """A batch of an evaluation is done and took ``seconds``."""
        self._evaluation.durations.append(seconds)
        self.progress()

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Files are written, by this process at least."""
        with self._doing(self._writing, together=False):
            yield

    @contextlib.contextmanager
    def _doing(self, work: _Work, *, together: bool) -> Iterator[None]:
        before = self._work
        self._begin(work, together)
        try:
            yield
        finally:
            self._begin(before, together)

    def _begin(self, work: _Work, together: bool) -> None:
        self._work = work
        if together:
            self.beat()
        else:
            self.progress()
        # At once, so that the others know it even if this process freezes now.
        with contextlib.suppress(RuntimeError):  # a lost connection is the watching thread's affair
            self._publish()

    def _waits(self) -> bool:
        """Whether the main thread is in a collective operation.

        In the backward pass it may be without showing it here; there the beats tell.
        """
        frame = sys._current_frames().get(self._main_thread)
        while frame:
            if frame.f_code.co_filename == distributed_c10d.__file__:
                return True
            frame = frame.f_back
        return False

    def _publish(self) -> None:
        work = self._work
        limit, silence = (round(seconds / self._interval) for seconds in work.limits())
        late = self._rounds_since_progress > limit
        state = _State(self._rounds, self._beats, late, limit, silence, self._waits(), work.what)
        self._store.set(str(self._rank), json.dumps(state))

    def _exchange(self) -> None:
        try:
            self._publish()
            answer = self._store.multi_get([str(rank) for rank in range(self._world_size)])
        except RuntimeError:  # the connection is lost; the watching thread counts its rounds
            return
        states = [_State(*json.loads(state)) for state in answer]
        old = self._seen or [(state, 0) for state in states]
        self._seen = [
            (state, 0 if state.round != before.round else rounds + 1)
            for state, (before, rounds) in zip(states, old, strict=True)
        ]
        self._rounds_unanswered = 0

    def _watch(self) -> None:
        exchange = None
        while not self._ended.wait(self._interval):
            self._rounds += 1
            self._rounds_since_progress += 1
            self._rounds_unanswered += 1
            self._notice_work()
            # In a thread of its own, because nothing interrupts a store that does not answer.
            if exchange is None or not exchange.is_alive():
                exchange = threading.Thread(target=self._exchange, daemon=True)
                exchange.start()
            limit, _ = self._work.limits()
            if self._rounds_unanswered > limit / self._interval:
                self._end_run(
                    "the process that started the run, or that of rank 0, no longer answers"
                )
            hanging = self._hanging()
            if hanging:
                ranks = ", ".join(map(str, hanging))
                state, silent = self._seen[hanging[0]]
                rounds = state.limit if state.late else min(silent, state.silence)
                self._end_run(
                    f"rank {ranks} of {self._world_size} {'hang' if hanging[1:] else 'hangs'}: no "
                    f"progress {state.what}for {rounds * self._interval:.0f} s; the run was ended",
                    hanging,
                )

    def _notice_work(self) -> None:
        busy = time.clock_gettime(self._clock)
        if self._work.busy_counts and busy - self._busy_before > BUSY_SECONDS:
            self.progress()
        self._busy_before = busy

    def _hanging(self) -> list[int]:
        """The processes furthest behind, if all of them are late; the others wait for them."""
        if not self._seen:
            return []
        furthest_behind = min(state.beats for state, _ in self._seen)
        behind = [
            (rank, state, silent)
            for rank, (state, silent) in enumerate(self._seen)
            if state.beats == furthest_behind
        ]
        behind = [entry for entry in behind if not entry[1].waits] or behind
        if not all(state.late or silent > state.silence for _, state, silent in behind):
            return []
        # Not even its watching thread runs.
        frozen = [rank for rank, _, silent in behind if silent > 2]
        return frozen or [rank for rank, _, _ in behind]

    def _end_run(self, message: str, hanging: list[int] | None = None) -> None:
        if self._ended.is_set():
            return
        if hanging and self._rank in hanging:
            print(f"rank {self._rank} stands at:", file=sys.stderr)
            traceback.print_stack(sys._current_frames()[self._main_thread])
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
    """Make ``heartbeat`` the one that the functions of this module move in this process."""
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


def writing() -> contextlib.AbstractContextManager[None]:
    """Files are written, for which a disk may have to be waited for."""
    return _running.writing() if _running else contextlib.nullcontext()


class EvaluatedBatches:
    """The batches of a loader; each that has been evaluated is progress.

    Args:
        loader: has a length and gives batches.
    """

    def __init__(self, loader: Collection[Any]) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        if _running is None:
            yield from self._loader
            return
        with _running.evaluation():
            began = time.monotonic()
            for batch in self._loader:
                yield batch
                now = time.monotonic()
                _running.evaluated(now - began)
                began = now
