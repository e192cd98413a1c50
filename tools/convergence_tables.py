"""What the curves of a comparison say in numbers."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddetr_d2.checkpoint.whole_files import whole_file

import numpy as np
from convergence_curves import METRICS, Curve
from convergence_members import MEMBERS
from tabulate import tabulate

# AP levels of the tables, in percent; those that a member comes to.
LEVELS = (5, 10, 20, 30, 40, 50, 60)
_SHARE_OF_BASELINE = 0.9


@dataclass(frozen=True)
class Results:
    """The finished runs of a comparison.

    Attributes:
        curves: of each member, by its seeds; members without a finished run are left out.
        searches: AP of each rate that was tried, by the members that have a search of their own.
        rates: learning rate of each member.
        iterations: what every member but the baseline trains.
        epoch: iterations in which every image is seen once, on average.
        seeds: how many seeds there are to be.
    """

    curves: Mapping[str, Mapping[int, Curve]]
    searches: Mapping[str, Mapping[float, float]]
    rates: Mapping[str, float]
    iterations: int
    epoch: float
    seeds: int

    @property
    def baseline(self) -> str | None:
        """The member that the others are compared with."""
        return next((m for m in self.curves if MEMBERS[m].is_baseline), None)

    def shared_iterations(self) -> list[int]:
        """Iterations after which all members were evaluated, and those of the baseline beyond."""
        chosen = [self.iterations * share // 10 for share in (1, 2, 5, 10, 20, 50, 100)]
        every = [curve.iterations for found in self.curves.values() for curve in found.values()]
        return [i for i in chosen if any(i in iterations for iterations in every)]

    def at(self, member: str, metric: str, iterations: int) -> list[float]:
        """Percentages of all seeds; empty where ``member`` was not evaluated."""
        found = [curve.at(metric, iterations) for curve in self.curves[member].values()]
        return [value for value in found if value is not None]

    def mean(self, member: str) -> Curve:
        """Mean over the seeds."""
        curves = list(self.curves[member].values())
        values = {
            metric: np.mean([curve.values[metric] for curve in curves], axis=0).tolist()
            for metric in METRICS
        }
        minutes = np.mean([curve.minutes for curve in curves], axis=0).tolist()
        return Curve(curves[0].iterations, minutes, values)

    def iterations_to(self, member: str, metric: str, level: float) -> float | None:
        """When the mean over the seeds comes to ``level``; None if it does not."""
        return self.mean(member).iterations_to(metric, level)

    def levels(self, metric: str) -> list[float]:
        """The levels that iterations are counted to: 90% of the baseline's end, then round ones."""
        ends = {member: self.mean(member).values[metric][-1] for member in self.curves}
        levels = [level for level in LEVELS if level <= max(ends.values())]
        if self.baseline:
            levels.insert(0, _SHARE_OF_BASELINE * ends[self.baseline])
        return levels

    def ratio(self, member: str, metric: str, level: float) -> tuple[float | None, bool]:
        """How many times the iterations of ``member`` the baseline needs to come to ``level``.

        Returns:
            the ratio, None without a baseline or where ``member`` does not come to it; and
            whether it is no more than a lower bound, since the baseline does not come to it.
        """
        own = self.iterations_to(member, metric, level)
        if own is None or self.baseline is None:
            return None, False
        needed = self.iterations_to(self.baseline, metric, level)
        if needed is None:
            return self.mean(self.baseline).iterations[-1] / own, True
        return needed / own, False


def write_tables(results: Results, folder: Path, stem: str) -> None:
    """Write ``stem``.md and ``stem``.json into ``folder``."""
    for suffix, text in ((".md", as_markdown(results)), (".json", as_json(results))):
        with whole_file(str(folder / (stem + suffix))) as file:
            file.write(text.encode())


def as_markdown(results: Results) -> str:
    """All tables, each under a heading."""
    parts = [("Budget", _budget(results))]
    for metric in ("AP", "APs"):
        parts.append((f"{metric} at equal iterations", _equal_iterations(results, metric)))
    parts.append(("AP at the end", _ends(results)))
    for metric in ("AP", "APs"):
        parts.append((f"Iterations to equal {metric}", _equal_ap(results, metric)))
    if any(results.searches.values()):
        parts.append(("Search of the learning rate", _search(results)))
    return "\n".join(f"### {title}\n\n{table}\n" for title, table in parts)


def as_json(results: Results) -> str:
    """The curves of every seed, and what the tables say, as text."""
    content: dict[str, Any] = {
        "iterations": results.iterations,
        "iterations_per_epoch": results.epoch,
        "baseline": results.baseline,
        "members": {},
    }
    for member, curves in results.curves.items():
        to_level = {}
        for metric in ("AP", "APs"):
            for level in results.levels(metric):
                ratio, is_bound = results.ratio(member, metric, level)
                to_level.setdefault(metric, []).append(
                    {
                        "level": level,
                        "iterations": results.iterations_to(member, metric, level),
                        "baseline_ratio": ratio,
                        "ratio_is_lower_bound": is_bound,
                    }
                )
        content["members"][member] = {
            "label": MEMBERS[member].label,
            "learning_rate": results.rates[member],
            "search": {f"{rate:g}": ap for rate, ap in results.searches.get(member, {}).items()},
            "iterations_to": to_level,
            "seeds": {
                str(seed): {
                    "iterations": curve.iterations,
                    "cpu_minutes": curve.minutes,
                    **curve.values,
                }
                for seed, curve in curves.items()
            },
        }
    return json.dumps(content, indent=1) + "\n"


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"


def _budget(results: Results) -> str:
    rows = []
    for member, curves in results.curves.items():
        ends = [(c.iterations[-1], c.minutes[-1]) for c in curves.values()]
        iterations = max(i for i, _ in ends)
        each = np.mean([minutes * 60_000 / i for i, minutes in ends])
        rows.append(
            (
                MEMBERS[member].label,
                f"{len(curves)} of {results.seeds}",
                f"{results.rates[member]:g}",
                f"{iterations:,}",
                f"{iterations / results.epoch:.1f}",
                f"{np.mean([minutes for _, minutes in ends]):.1f}",
                f"{each:.0f}",
            )
        )
    headers = (
        "",
        "seeds",
        "learning rate",
        "iterations",
        "epochs",
        "CPU minutes",
        "ms / iteration",
    )
    return _table(rows, headers)


def _equal_iterations(results: Results, metric: str) -> str:
    times = results.shared_iterations()
    rows = [
        (MEMBERS[member].label, *(_spread(results.at(member, metric, i)) for i in times))
        for member in results.curves
    ]
    return _table(rows, ("iterations", *(f"{i:,}" for i in times)))


def _ends(results: Results) -> str:
    rows = []
    for member, curves in results.curves.items():
        found = [
            _spread([curve.values[metric][-1] for curve in curves.values()]) for metric in METRICS
        ]
        rows.append((MEMBERS[member].label, *found))
    return _table(rows, ("", *METRICS))


def _equal_ap(results: Results, metric: str) -> str:
    levels = results.levels(metric)
    rows = []
    for member in results.curves:
        row = [MEMBERS[member].label]
        for level in levels:
            needed = results.iterations_to(member, metric, level)
            ratio, is_bound = results.ratio(member, metric, level)
            cell = "not reached" if needed is None else f"{needed:,.0f}"
            if ratio is not None and member != results.baseline:
                cell += f" ({'> ' if is_bound else ''}{ratio:.1f} x)"
            row.append(cell)
        rows.append(row)
    headers = [f"{metric} {level:g}" for level in levels]
    if results.baseline:
        headers[0] = (
            f"{metric} {levels[0]:.1f} ({_SHARE_OF_BASELINE:.0%} of what "
            f"{MEMBERS[results.baseline].label} comes to)"
        )
    return _table(rows, ("", *headers))


def _search(results: Results) -> str:
    rates = sorted({rate for found in results.searches.values() for rate in found})
    rows = []
    for member, found in results.searches.items():
        cells = []
        for rate in rates:
            value = found.get(rate, math.nan)
            text = "" if math.isnan(value) else f"{value:.1f}"
            cells.append(f"**{text}**" if rate == results.rates[member] else text)
        rows.append((MEMBERS[member].label, *cells))
    return _table(rows, ("", *(f"{rate:g}" for rate in rates)))
