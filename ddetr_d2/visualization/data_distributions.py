"""A picture of how classes, sizes, shapes, positions and numbers of objects are distributed."""

import numpy as np
from detectron2.config import CfgNode
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ..data.coco import CocoAnnotations
from ..data.report.data_set import DataSetReport, resized_objects, resized_sizes
from .labels import set_label_fonts

_MOST_CLASSES = 25
_MOST_CELLS = 50  # of a side of the picture of positions
_BAR_COLOR, _LINE_COLOR = "tab:blue", "tab:red"


def draw_distributions(annotations: CocoAnnotations, report: DataSetReport, cfg: CfgNode) -> Figure:
    """Draw how classes, sizes, shapes, positions and numbers of objects are distributed.

    Args:
        annotations: the data set.
        report: on the same set.
        cfg: the configuration of the report.
    """
    figure = Figure((15, 9), layout="constrained")
    axes = figure.subplots(2, 3)
    sizes = resized_sizes(annotations, cfg, report.role)
    boxes = resized_objects(annotations, sizes)
    _draw_classes(axes[0, 0], report)
    _draw_object_sizes(axes[0, 1], boxes, report)
    _draw_objects_per_image(axes[0, 2], annotations, report)
    _draw_aspects(axes[1, 0], sizes, boxes)
    _draw_image_sizes(axes[1, 1], sizes, report)
    _draw_positions(axes[1, 2], boxes, sizes[annotations.image_index[~annotations.crowd]])
    title = f"{report.name}: {report.images:,} images, {report.objects:,} objects"
    set_label_fonts([figure.suptitle(title)])
    return figure


def _draw_classes(axes: Axes, report: DataSetReport) -> None:
    classes = sorted(report.classes, key=lambda c: -c.objects)
    shown = classes[:_MOST_CLASSES]
    axes.barh(range(len(shown)), [c.objects for c in shown], color=_BAR_COLOR)
    axes.set_yticks(range(len(shown)), [_shortened(c.name) for c in shown], fontsize=8)
    labels = axes.get_yticklabels()
    set_label_fonts(labels)
    # An axis writes the labels anew when it is drawn.
    axes.set_yticks(axes.get_yticks(), [label.get_text() for label in labels])
    axes.invert_yaxis()
    axes.set_xlabel("objects")
    hidden = len(classes) - len(shown)
    axes.set_title(f"Classes, the {len(shown)} largest of {len(classes)}" if hidden else "Classes")


def _draw_object_sizes(axes: Axes, boxes: np.ndarray, report: DataSetReport) -> None:
    sizes = np.sqrt(boxes[:, 2] * boxes[:, 3])
    if len(sizes):
        sizes = np.maximum(sizes, 1)
        axes.hist(
            sizes, bins=[*np.geomspace(sizes.min(), 1.01 * sizes.max(), 50)], color=_BAR_COLOR
        )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("sqrt(width x height), pixels after the resize")
    axes.set_ylabel("objects")
    resize = report.resize
    axes.set_title(
        f"Sizes of objects, shortest side {resize.shortest}" if resize.shortest else "Object sizes"
    )


def _draw_objects_per_image(
    axes: Axes, annotations: CocoAnnotations, report: DataSetReport
) -> None:
    counts = annotations.objects_per_image()
    step = max(1, int(np.ceil((counts.max() + 1) / 50)))
    axes.hist(counts, bins=[*np.arange(0, counts.max() + step + 1, step) - 0.5], color=_BAR_COLOR)
    # A line far beyond the data would press it against the other border.
    if report.object_queries <= 2 * counts.max():
        axes.axvline(report.object_queries, color=_LINE_COLOR)
    label = f"NUM_QUERIES: {report.object_queries}, most objects: {counts.max()}"
    axes.set_title(f"Objects in an image\n{label}")
    axes.set_xlabel("objects")
    axes.set_ylabel("images")


def _draw_aspects(axes: Axes, sizes: np.ndarray, boxes: np.ndarray) -> None:
    for values, label in ((boxes[:, 2:], "objects"), (sizes, "images")):
        values = values[(values > 0).all(axis=1)]
        if len(values):
            ratios = np.log2(values[:, 0] / values[:, 1]).clip(-5, 5)
            weights = np.full(len(ratios), 1 / len(ratios))
            axes.hist(
                ratios, bins=[*np.linspace(-5, 5, 61)], weights=weights, alpha=0.6, label=label
            )
    axes.set_xticks(range(-4, 5, 2), ["1/16", "1/4", "1", "4", "16"])
    axes.set_xlabel("width / height")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{share:.0%}"))
    axes.legend()
    axes.set_title("Aspect ratios")


def _draw_image_sizes(axes: Axes, sizes: np.ndarray, report: DataSetReport) -> None:
    shapes, counts = np.unique(sizes, axis=0, return_counts=True)
    area = 10 + 200 * counts / counts.max()
    axes.scatter(shapes[:, 0], shapes[:, 1], s=area, color=_BAR_COLOR, alpha=0.5)
    limit = 1.1 * shapes.max()
    axes.set(xlim=(0, limit), ylim=(0, limit), aspect="equal")
    axes.set_xlabel("width, pixels after the resize")
    axes.set_ylabel("height")
    axes.set_title(f"Sizes of images, {len(shapes):,} different")


def _draw_positions(axes: Axes, boxes: np.ndarray, sizes: np.ndarray) -> None:
    centers = (boxes[:, :2] + boxes[:, 2:] / 2) / sizes
    # Enough objects in a cell for a pattern to show.
    cells = int(np.clip(np.sqrt(len(boxes) / 10), 5, _MOST_CELLS))
    grid, *_ = np.histogram2d(centers[:, 1], centers[:, 0], bins=cells, range=[(0, 1), (0, 1)])
    axes.imshow(grid, extent=(0, 1, 1, 0), cmap="viridis", aspect="auto")
    axes.set_xlabel("x / width of the image")
    axes.set_ylabel("y / height of the image")
    axes.set_title("Centers of objects")


def _shortened(name: str) -> str:
    return name if len(name) <= 25 else name[:22] + "..."
