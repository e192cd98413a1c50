"""AP over the iterations of a training run, read from its metrics.json."""

import bisect
import json
from dataclasses import dataclass, field
from pathlib import Path

from ddetr_d2.errors import UserError

# As tables call them, and as metrics.json does.
METRICS = {"AP": "bbox/AP", "APs": "bbox/APs", "APm": "bbox/APm", "APl": "bbox/APl"}


@dataclass(frozen=True)
class Curve:
    """What the evaluations of a run have found.

    Attributes:
        iterations: done before each evaluation, ascending.
        minutes: processor time of the training until then.
        values: percentages of each evaluation, by the keys of :data:`METRICS`.
    """

    iterations: list[int] = field(default_factory=list)
    minutes: list[float] = field(default_factory=list)
    values: dict[str, list[float]] = field(default_factory=lambda: {key: [] for key in METRICS})

    def at(self, metric: str, iterations: int) -> float | None:
        """Percentage after so many iterations; None where that was not evaluated."""
        if iterations not in self.iterations:
            return None
        return self.values[metric][self.iterations.index(iterations)]

    def until(self, iterations: int) -> "Curve":
        """The part of the curve up to ``iterations``."""
        end = bisect.bisect_right(self.iterations, iterations)
        values = {key: found[:end] for key, found in self.values.items()}
        return Curve(self.iterations[:end], self.minutes[:end], values)

    def iterations_to(self, metric: str, level: float) -> float | None:
        """Iterations until the percentage first is ``level``, None where it never is.

        Between two evaluations, and from 0 before the first, the curve is taken to be straight.
        """
        before, low = 0, 0.0
        for after, high in zip(self.iterations, self.values[metric], strict=True):
            if high >= level:
                share = (level - low) / (high - low) if high > low else 1.0
                return before + max(share, 0.0) * (after - before)
            before, low = after, high
        return None


def read_curve(path: Path) -> Curve:
    """Read the ``metrics.json`` of a run; an empty curve where there is no such file.

    Raises:
        UserError: it holds something else.
    """
    if not path.exists():
        return Curve()
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"{path} is no file of training metrics: {error}") from error
    merged: dict[int, dict[str, float]] = {}
    for line in lines:  # of a resumed run the later line counts
        if "iteration" in line:
            merged.setdefault(line["iteration"], {}).update(line)
    curve, minutes, last, seconds = Curve(), 0.0, -1, 0.0
    for iteration in sorted(merged):
        line = merged[iteration]
        seconds = line.get("cpu_time", seconds)  # of a step, median of the last 20
        minutes += (iteration - last) * seconds / 60
        last = iteration
        if METRICS["AP"] in line:
            curve.iterations.append(iteration + 1)
            curve.minutes.append(minutes)
            for key, name in METRICS.items():
                curve.values[key].append(line.get(name, float("nan")))
    return curve
