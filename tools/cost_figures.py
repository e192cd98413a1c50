"""Tables and the picture of tools/compare_cost.py, with the exponents of power laws."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from cost_cases import MEMBERS, PARTS, PASSES
from matplotlib.axes import Axes

from benchmarks.report import Record, table

# Exponents are fitted to sizes from this share of the largest short side on.
UPPER_END = 0.5
QUANTITIES = {"seconds": "time, s", "megabytes": "memory, MB"}


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """b of the power law ``value = a * size ** b`` by least squares of the logarithms.

    Args:
        sizes: numbers of pixels.
        values: what was measured there. Those of the smaller half of the short sides, a quarter of
            the pixels, are left out: there, what grows more slowly still counts.

    Returns:
        None with fewer than two values.
    """
    first = max(sizes, default=0) * UPPER_END**2
    upper = [(math.log(x), math.log(y)) for x, y in zip(sizes, values, strict=True) if x >= first]
    if len(upper) < 2:
        return None
    return statistics.linear_regression(*zip(*upper, strict=True)).slope


def series(
    records: Sequence[Record], part: str, pass_: str, member: str, quantity: str
) -> tuple[list[int], list[float]]:
    """Pixels, and one quantity of one member there."""
    wanted = {"part": part, "pass": pass_, "member": member}
    chosen = [x for x in records if wanted.items() <= x.items()]
    chosen.sort(key=lambda x: x["pixels"])
    return [x["pixels"] for x in chosen], [x[quantity] for x in chosen]


def rows_of(records: Sequence[Record], quantity: str) -> list[Record]:
    """One row for each part, pass and member: its value by short side, and the exponent."""
    rows: dict[tuple[str, str, str], Record] = {}
    for x in records:
        key = x["part"], x["pass"], x["member"]
        row = rows.setdefault(key, {"part": key[0], "pass": key[1], "member": key[2]})
        row["label"] = MEMBERS[key[2]].label
        row[x["height"]] = x[quantity]
    for key, row in rows.items():
        row["exponent"] = exponent(*series(records, *key, quantity))
    order = [list(names) for names in (PARTS, PASSES, MEMBERS)]
    return sorted(
        rows.values(),
        key=lambda x: [
            names.index(x[key])
            for names, key in zip(order, ("part", "pass", "member"), strict=True)
        ],
    )


def tables(records: Sequence[Record]) -> str:
    """Markdown tables of both quantities."""
    sizes = dict(sorted({x["height"]: x["width"] for x in records}.items()))
    texts = []
    for quantity, title in QUANTITIES.items():
        columns = {"part": "part", "pass": "pass", "label": "attention"}
        columns |= {height: f"{height} x {width}" for height, width in sizes.items()}
        columns["exponent"] = "exponent"
        rows = rows_of(records, quantity)
        for row in rows:
            row["exponent"] = row["exponent"] and f"{row['exponent']:.2f}"
        texts.append(table(title[0].upper() + title[1:], rows, columns))
    return "\n".join(texts)


def draw(records: Sequence[Record], output: Path) -> None:
    """Draw both quantities of each part over the pixels, on double logarithmic axes.

    At the end of each line stands its exponent.
    """
    parts = [part for part in PARTS if any(x["part"] == part for x in records)]
    size = 11, 4.5 * len(parts) + 0.6
    figure, grid = plt.subplots(
        len(parts), 2, figsize=size, sharex=True, layout="constrained", squeeze=False
    )
    for part, line in zip(parts, grid, strict=True):
        for (quantity, label), axes in zip(QUANTITIES.items(), line, strict=True):
            _draw_lines(axes, [x for x in records if x["part"] == part], quantity)
            axes.set_title(f"{part}: {label.partition(',')[0]}")
            axes.set_ylabel(label)
    ticks = {x["pixels"]: str(x["height"]) for x in sorted(records, key=lambda x: x["pixels"])}
    for axes in grid[-1]:
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.set_xlim(right=1.5 * max(ticks))  # room for the exponents
        axes.minorticks_off()
        axes.set_xlabel("pixels of the image, of 4:3 with the short side that is marked")
    lines, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(output, dpi=100)
    plt.close(figure)


def _draw_lines(axes: Axes, records: Sequence[Record], quantity: str) -> None:
    for row in rows_of(records, quantity):
        pixels, values = series(records, row["part"], row["pass"], row["member"], quantity)
        index = list(MEMBERS).index(row["member"])
        training = row["pass"] == PASSES[1]
        axes.loglog(
            pixels,
            values,
            color=f"C{index}",
            linestyle="-" if training else "--",
            linewidth=3 - index,  # so that one below another one can be seen
            marker="o" if training else ".",
            label=f"{row['label']}, {row['pass']}",
        )
        if row["exponent"] is not None:
            axes.annotate(
                f"{row['exponent']:.2f}",
                (pixels[-1], values[-1]),
                xytext=(7, 0),
                textcoords="offset points",
                va="center",
                color=f"C{index}",
                fontsize=9,
            )
    axes.grid(alpha=0.3)
