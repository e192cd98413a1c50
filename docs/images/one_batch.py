#!/usr/bin/env python
"""Draw one_batch.png, the picture of docs/one_batch.md: ``python docs/images/one_batch.py``."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

# Rows of the picture: who does it, colour, and its stations: name, file, what leaves it.
ROWS = [
    (
        "Training process: which images",
        "#f3ead7",
        [
            ("records", "data/datasets.py", "118,287 records"),
            ("order", "data/batches.py", "32 positions"),
            ("share", "data/loader.py", "N of them"),
        ],
    ),
    (
        "Data worker: from a file to tensors",
        "#dcebf7",
        [
            ("reading", "data/images.py", "480 × 640 × 3"),
            ("augmentation", "data/augmentation.py", "800 × 1066 × 3, boxes"),
            ("tensors", "data/mapper.py", "3 × 800 × 1066, boxes"),
        ],
    ),
    (
        "Training process: from images to tokens",
        "#e3f1df",
        [
            ("micro-batch", "data/loader.py", "N images"),
            ("boxes counted", "engine/training_step.py", "one number"),
            ("padding", "modeling/set_detector.py", "N × 3 × 800 × 1066"),
            ("backbone", "modeling/backbone.py", "strides 8, 16, 32"),
            ("levels", "modeling/feature_levels.py", "N × 17,821 × 256"),
        ],
    ),
    (
        "Training process: from tokens to losses",
        "#e3f1df",
        [
            ("encoder", "modeling/transformer.py", "N × 17,821 × 256"),
            ("queries", "modeling/queries.py", "N × 300 × 256"),
            ("decoder", "modeling/transformer.py", "classes, boxes, 6 times"),
            ("matching", "modeling/matcher.py", "query and object"),
            ("losses", "modeling/criterion.py", "18 numbers"),
        ],
    ),
    (
        "All training processes together: from losses to new weights",
        "#f0e2ef",
        [
            ("backward", "engine/training_step.py", "gradients"),
            ("clipping, check", "engine/optimizer.py", "norm at most 0.1"),
            ("update", "engine/training_step.py", "new weights"),
            ("hooks", "engine/trainer.py", "files, figures"),
        ],
    ),
]
# Of a station, and from one to the next, in units of the axes.
WIDTH, HEIGHT, COLUMN, ROW = 2.45, 1.0, 2.85, 1.85
LINE = "#444444"


def draw(path: Path) -> None:
    """Draw the stations row by row."""
    width, height = max(len(row[2]) for row in ROWS) * COLUMN + 0.1, len(ROWS) * ROW + 0.1
    figure = plt.figure(figsize=(width * 0.8, height * 0.8))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    number = 0
    for row, (who, colour, stations) in enumerate(ROWS):
        top = height - 0.1 - row * ROW
        _box(axes, 0.1, top - ROW + 0.2, width - 0.2, ROW - 0.2, facecolor=colour, edgecolor="none")
        axes.text(
            0.5 + WIDTH / 2,
            top - 0.24,
            who,
            fontsize=11,
            color="#555555",
            style="italic",
            va="center",
        )
        bottom = top - ROW + 0.34
        for column, (name, file, result) in enumerate(stations):
            number += 1
            left = 0.3 + column * COLUMN
            _box(axes, left, bottom, WIDTH, HEIGHT, facecolor="white", edgecolor=LINE)
            x = left + WIDTH / 2
            for y, words, style in (
                (0.77, f"{number}  {name}", {"fontsize": 12, "weight": "bold"}),
                (0.48, file, {"fontsize": 7.8, "family": "monospace", "color": "#333333"}),
                (0.21, f"→ {result}", {"fontsize": 9.5, "color": "#1f4e79"}),
            ):
                axes.text(x, bottom + y * HEIGHT, words, ha="center", va="center", **style)
            if column:
                _arrow(axes, left - COLUMN + WIDTH, bottom + HEIGHT / 2, left, bottom + HEIGHT / 2)
        if row + 1 < len(ROWS):  # to the first station of the next row, between the rows
            gap, first = bottom - 0.24, 0.3 + WIDTH / 2
            axes.plot(
                [x, x, first, first], [bottom, gap, gap, gap - 0.2], color=LINE, linewidth=1.2
            )
            _arrow(axes, first, gap - 0.1, first, bottom - ROW + HEIGHT)
    figure.savefig(path, dpi=110, facecolor="white")
    plt.close(figure)


def _box(axes: plt.Axes, x: float, y: float, width: float, height: float, **style: str) -> None:
    shape = "round,pad=0,rounding_size=0.1"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, linewidth=1.1, **style))


def _arrow(axes: plt.Axes, x0: float, y0: float, x1: float, y1: float) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 13, "shrinkA": 0, "shrinkB": 1}
    axes.add_patch(FancyArrowPatch((x0, y0), (x1, y1), color=LINE, zorder=3, **style))


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
