#!/usr/bin/env python
"""Draw the loss and the AP of training runs over time, from the metrics.json that each writes."""

import argparse
import json
import os
from collections.abc import Mapping, Sequence

import matplotlib

matplotlib.use("Agg")  # no display needed
from ddetr_d2.errors import UserError, exit_on_user_error

import matplotlib.pyplot as plt

AP_KEYS = {"bbox/AP": "AP", "bbox/AP50": "AP50", "bbox/AP75": "AP75"}


def read_metrics(folder: str) -> list[dict[str, float]]:
    """Lines of ``folder``/metrics.json with ``minutes`` of training added to each.

    A run that was resumed repeats iterations; the later line counts.

    Raises:
        UserError: if there is no such file or it holds no training metrics.
    """
    path = os.path.join(folder, "metrics.json")
    try:
        with open(path) as file:
            lines = [json.loads(line) for line in file if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the OUTPUT_DIR of a training run.") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no file of training metrics: {error}") from error
    by_iteration = {line["iteration"]: line for line in lines if "iteration" in line}
    metrics = [by_iteration[iteration] for iteration in sorted(by_iteration)]
    if not any("total_loss" in line for line in metrics):
        raise UserError(f"{path} holds no losses yet; wait for the run's first 20 iterations.")
    minutes, last, seconds = 0.0, -1, 0.0
    for line in metrics:
        seconds = line.get("time", seconds)  # of one iteration
        minutes += (line["iteration"] - last) * seconds / 60
        last = line["iteration"]
        line["minutes"] = minutes
    return metrics


def plot(runs: Mapping[str, list[dict[str, float]]], output: str) -> None:
    """Draw loss (left) and AP (right) over minutes of training into the file ``output``.

    Args:
        runs: metrics of each run by its name, see :func:`read_metrics`. Of several runs AP alone is
            drawn, of one AP50 and AP75 as well.
        output: file name of the picture.
    """
    figure, (loss_axes, ap_axes) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    alone = len(runs) == 1
    for name, metrics in runs.items():
        color = "tab:gray" if alone else None
        draw(loss_axes, metrics, "total_loss", name, color=color)
        for key, label in AP_KEYS.items() if alone else [("bbox/AP", name)]:
            draw(ap_axes, metrics, key, label, marker="o")
    loss_axes.set_ylabel("total loss")
    loss_axes.set_ylim(bottom=0)
    ap_axes.set_ylabel("AP (COCO), %")
    ap_axes.set_ylim(0, 100)
    if ap_axes.lines:
        ap_axes.legend(loc="lower right")
    for axes in (loss_axes, ap_axes):
        axes.set_xlabel("minutes of training")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    figure.savefig(output, dpi=100)
    plt.close(figure)


def draw(
    axes: plt.Axes, metrics: list[dict[str, float]], key: str, label: str, **style: str | None
) -> None:
    """Draw what ``metrics`` have under ``key`` over minutes, if anything."""
    points = [(line["minutes"], line[key]) for line in metrics if key in line]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, **style)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="folder", help="OUTPUT_DIR of a run")
    parser.add_argument(
        "--output", help="picture to write (default: training.png in the first folder)"
    )
    args = parser.parse_args(arguments)
    output = args.output or os.path.join(args.folders[0], "training.png")
    names = [os.path.basename(os.path.normpath(folder)) for folder in args.folders]
    if len(set(names)) < len(names):
        names = args.folders
    runs = map(read_metrics, args.folders)
    plot(dict(zip(names, runs, strict=True)), output)
    print(f"wrote {output}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
