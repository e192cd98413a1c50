"""What is compared side by side, and how one comparison becomes rows of the table."""

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from ddetr_d2.errors import UserError

import torch
from torch import Tensor
from tqdm import tqdm

from . import profiling
from .memory import MEGABYTE, peak_gpu_memory, peak_memory
from .report import Record, note
from .timing import CASE_SECONDS, FEWEST_TURNS, Run, Timer, in_turns, wall_seconds

OURS = "ddetr_d2"
COLUMNS = {
    "case": "case",
    "implementation": "implementation",
    "ms": "ms",
    "times_first": "times as fast as the first",
    "times_ours": f"times as fast as {OURS}",
    "limit_share": "share of the limit",
    "launches": "kernels launched",
    "waits": "waits of the host",
    "growth_mb": "memory grows by, MB",
    "growth_share": "share of the first's",
    "difference": "difference",
}


@dataclass
class Prepared:
    """One implementation, ready to run.

    Attributes:
        run: what is timed.
        result: gives the tensors that are compared with those of the others, or the difference
            itself; None compares nothing.
        tolerance: greatest difference with which it counts as the same computation.
        limit: gives the seconds that the work takes at least; or "profile", for the time that
            convolutions and matrix products alone take by the profiler.
    """

    run: Run
    result: Callable[[], Sequence[Tensor] | float] | None = None
    tolerance: float = float("inf")
    limit: Callable[[], float] | Literal["profile"] | None = None


@dataclass
class Case:
    """A comparison.

    Attributes:
        name: part, sizes and pass, in words.
        make: prepares each implementation, by its name; picklable where memory is measured. An
            ImportError or UserError, and any error of what is not this project's, leaves the
            implementation out. The first one that is not left out is what the others are compared
            with.
        seconds: what one turn of all takes, roughly, on two cores: for the time left.
        memory: measure memory as well.
        short: see :func:`benchmarks.timing.in_turns`.
        timer: seconds of one call.
        expected: gives the tensors that results are compared with, by default those of the first.
    """

    name: str
    make: dict[str, Callable[[], Prepared]]
    seconds: float = 1.0
    memory: bool = False
    short: bool = False
    timer: Timer = wall_seconds
    expected: Callable[[], Sequence[Tensor]] | None = None

    def weight(self, turns: int, with_memory: bool) -> float:
        """Rough number of seconds in all."""
        turns = min(turns, max(FEWEST_TURNS, math.ceil(CASE_SECONDS / self.seconds)))
        processes = len(self.make) * 10 + 2 * self.seconds
        return self.seconds * (turns + 2) + (processes if self.memory and with_memory else 0)

    def measure(self, turns: int, with_memory: bool, device: str, progress: tqdm) -> list[Record]:
        """Measure.

        Args:
            turns: of each implementation.
            with_memory: memory as well, if the case has it.
            device: ``cpu`` or ``cuda``.
            progress: advanced by :meth:`weight` in all.

        Returns:
            a record for each implementation: names, times, memory, differences.
        """
        end = progress.n + self.weight(turns, with_memory)
        prepared, differences = self._prepare(progress)
        step = self.seconds / max(1, len(prepared))
        times = in_turns(
            {name: x.run for name, x in prepared.items()},
            turns,
            self.timer,
            lambda: progress.update(step),
            short=self.short,
        )
        first = next(iter(times), None)
        records = [
            {
                "case": self.name,
                "implementation": name,
                "ms": spread([x * 1e3 for x in seconds]),
                "times_first": None if name == first else ratio(times[first], seconds),
                "times_ours": ratio(times[OURS], seconds) if name.startswith(f"{OURS},") else None,
                **_limit(prepared[name], statistics.median(seconds), device),
                "difference": differences.get(name),
                "seconds": seconds,
            }
            for name, seconds in times.items()
        ]
        if self.memory and with_memory:
            growth = self._growth(prepared, device)
            for record, (grown, peak) in zip(records, growth, strict=False):
                record |= {"growth_mb": grown / MEGABYTE, "peak_mb": peak / MEGABYTE}
                record["growth_share"] = grown / growth[0][0]
        progress.update(end - progress.n)
        return records

    def _growth(self, prepared: dict[str, Prepared], device: str) -> list[tuple[int, int]]:
        """Growth and peak of the memory of each, in bytes; empty where the system does not tell."""
        if device == "cuda":
            return [peak_gpu_memory(x.run) for x in prepared.values()]
        names = list(prepared)
        prepared.clear()  # makes room for the processes that measure
        gc.collect()
        growth = [peak_memory(partial(run_of, self.make[name])) for name in names]
        return [] if None in growth else growth

    def _prepare(self, progress: tqdm) -> tuple[dict[str, Prepared], dict[str, float]]:
        """Those that are present and right, called once, and the differences of their results."""
        prepared, differences, expected = {}, {}, None
        if self.expected is not None:
            expected = self.expected()
        for name, make in self.make.items():
            progress.set_description_str(f"{self.name}: {name}")
            try:
                candidate = make()
                result = (candidate.result or candidate.run)()
            except ImportError as error:
                note(f"{self.name}: {name} is left out, pip install {error.name} brings it.")
                continue
            except UserError as error:
                note(f"{self.name}: {name} is left out: {error}")
                continue
            except Exception as error:  # what others raise where they cannot run
                if name.startswith(OURS):
                    raise
                note(f"{self.name}: {name} is left out: it fails with {error!r}")
                continue
            if candidate.result is not None:
                expected = result if expected is None else expected
                differences[name] = (
                    result if isinstance(result, float) else relative_difference(result, expected)
                )
            if not differences.get(name, 0.0) <= candidate.tolerance:  # NaN is a difference
                wrong = (
                    f"its results are wrong, by a relative difference of {differences[name]:.2g}"
                )
                if name.startswith(OURS):
                    raise RuntimeError(f"{self.name}: {name} is no use, {wrong}")
                note(f"{self.name}: {name} is left out: {wrong}.")
                continue
            if candidate.result not in (None, candidate.run):
                candidate.run()  # once untimed
            prepared[name] = candidate
        progress.set_description_str(self.name)
        progress.update(self.seconds)
        return prepared, differences


def run_of(make: Callable[[], Prepared]) -> Run:
    """What is timed of an implementation."""
    return make().run


def relative_difference(result: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest ``|x - y| / |y|``, with the Euclidean norm of each tensor; NaN if one of them is.

    Args:
        result: the tensors x.
        expected: the tensors y.
    """
    with torch.no_grad():
        parts = [
            (x.float() - y.float()).norm() / y.float().norm()
            for x, y in zip(result, expected, strict=True)
        ]
        return torch.stack(parts).max().item()


def spread(values: Sequence[float]) -> list[float]:
    """Median, lowest and highest."""
    return [statistics.median(values), min(values), max(values)]


def ratio(base: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """How many times as fast as ``base``, by medians, and the lowest and highest of one round."""
    _, *lowest_highest = spread([x / y for x, y in zip(base, seconds, strict=True)])
    return [statistics.median(base) / statistics.median(seconds), *lowest_highest]


def _limit(prepared: Prepared, median: float, device: str) -> Record:
    if prepared.limit is None:
        return {}
    if prepared.limit == "profile":
        profile = profiling.profile(prepared.run, device)
        return {"limit_share": profile.pop("matrix_share"), **profile}
    return {"limit_share": prepared.limit() / median}
