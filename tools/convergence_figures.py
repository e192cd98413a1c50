"""Pictures of the curves of a comparison."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
import numpy as np
from convergence_members import MEMBERS
from convergence_tables import Results
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import NullFormatter, StrMethodFormatter

_TITLES = {
    "APs": "APs: objects below 32² pixels",
    "APm": "APm: 32² to 96² pixels",
    "APl": "APl: objects above 96² pixels",
}


def draw(results: Results, output: Path) -> None:
    """Draw AP over iterations and over time, and APs, APm and APl over iterations.

    A line is the mean over the seeds, the band about it reaches from the lowest to the highest.
    """
    figure = plt.figure(figsize=(11, 8), constrained_layout=True)
    grid = figure.add_gridspec(2, 6)
    by_iterations = figure.add_subplot(grid[0, :3])
    by_time = figure.add_subplot(grid[0, 3:], sharey=by_iterations)
    _draw_curves(by_iterations, results, "AP")
    _draw_curves(by_time, results, "AP", over_time=True)
    by_iterations.set_title("AP, all objects")
    epochs = by_iterations.secondary_xaxis(
        -0.19, functions=(lambda i: i / results.epoch, lambda e: e * results.epoch)
    )
    epochs.set_xlabel("epochs")
    _number(epochs.xaxis)
    by_time.set_title("AP over the time of training")
    figure.legend(*by_iterations.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    for column, metric in enumerate(_TITLES):
        axes = figure.add_subplot(grid[1, 2 * column : 2 * column + 2], sharex=by_iterations)
        _draw_curves(axes, results, metric)
        axes.set_title(_TITLES[metric])
    figure.savefig(output, dpi=100)
    plt.close(figure)


def _draw_curves(axes: Axes, results: Results, metric: str, over_time: bool = False) -> None:
    for index, (member, curves) in enumerate(results.curves.items()):
        values = np.array([curve.values[metric] for curve in curves.values()])
        mean = results.mean(member)
        x = mean.minutes if over_time else mean.iterations
        color = f"C{index}"
        label = f"{MEMBERS[member].label} ({len(curves)} of {results.seeds} seeds)"
        axes.plot(x, mean.values[metric], color=color, label=label, marker=".", markersize=4)
        axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, lw=0)
    axes.set_xscale("log")
    _number(axes.xaxis)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("CPU minutes" if over_time else "iterations")
    axes.set_ylabel(f"{metric}, %")
    axes.grid(alpha=0.3, which="both")


def _number(axis: Axis) -> None:
    """Label the powers of ten alone, as 1,000 and not 10^3."""
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axis.set_minor_formatter(NullFormatter())
