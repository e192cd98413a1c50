"""A sheet of images of a data set with their boxes drawn."""

import math

import numpy as np
from matplotlib import color_sequences
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from ..data.coco import CocoAnnotations
from ..data.images import read_image
from ..errors import UserError
from .labels import set_label_fonts

_COLUMNS = 4
_CELL = 4.0  # inches, width of an image's place
_LONGEST = 800  # pixels of an image that are kept for the drawing
# In images of more objects only the largest of each class gets its name.
_MOST_LABELS = 15
_MOST_FAILURES = 20


def draw_samples(
    annotations: CocoAnnotations, count: int = 12, seed: int = 0
) -> tuple[Figure, list[str]]:
    """Draw images chosen at random, those with boxes first; crowds get dashed lines.

    An image that cannot be decoded is replaced by the next one.

    Args:
        annotations: the data set.
        count: of images.
        seed: decides on the choice.

    Returns:
        the picture; of images that could not be decoded why.

    Raises:
        UserError: there is no image that can be decoded among those tried.
    """
    order = np.random.default_rng(seed).permutation(len(annotations.images))
    has_boxes = np.bincount(annotations.image_index, minlength=len(order)) > 0
    order = order[np.argsort(~has_boxes[order], kind="stable")]
    samples: list[tuple[int, Image.Image]] = []
    failures: list[str] = []
    for index in order.tolist():
        if len(samples) == count or len(failures) == _MOST_FAILURES:
            break
        try:
            image = Image.fromarray(read_image(annotations.images[index].path))
        except UserError as error:
            failures.append(str(error))
            continue
        image.thumbnail((_LONGEST, _LONGEST))
        samples.append((index, image))
    if not samples:
        raise UserError(
            f"{annotations.source}: none of {len(failures)} images can be shown: {failures[0]}"
        )
    columns = min(_COLUMNS, len(samples))
    rows = math.ceil(len(samples) / columns)
    figure = Figure((columns * _CELL, rows * (0.75 * _CELL + 0.3)), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, (index, image) in zip(grid.flat, samples, strict=False):
        _draw_sample(axes, annotations, index, image)
    return figure, failures


def _draw_sample(axes: Axes, annotations: CocoAnnotations, index: int, image: Image.Image) -> None:
    record = annotations.images[index]
    axes.imshow(image, extent=(0, record.width, record.height, 0))
    rows = np.flatnonzero(annotations.image_index == index)
    names = list(annotations.categories.values())
    palette = np.array(color_sequences["tab10" if len(names) <= 10 else "tab20"])
    largest_first = rows[np.argsort(-annotations.boxes[rows, 2:].prod(axis=1))]
    labelled: set[int] = set()
    for row in largest_first:
        x, y, width, height = annotations.boxes[row]
        category = int(annotations.category_index[row])
        color = palette[category % len(palette)]
        style = "--" if annotations.crowd[row] else "-"
        axes.add_patch(
            Rectangle(
                (x, y), width, height, fill=False, color=color, linewidth=1.5, linestyle=style
            )
        )
        if len(rows) <= _MOST_LABELS or category not in labelled:
            labelled.add(category)
            axes.text(
                max(x, 0),
                max(y, 0),
                names[category],
                fontsize=8,
                color="black" if color @ (0.3, 0.6, 0.1) > 0.5 else "white",
                bbox={"facecolor": color, "edgecolor": "none", "pad": 1, "alpha": 0.8},
                # Above the box where there is room.
                verticalalignment="bottom" if y > 0.06 * record.height else "top",
                clip_on=True,
            )
    set_label_fonts(axes.texts)
    # Boxes may reach beyond the image.
    axes.set_xlim(0, record.width)
    axes.set_ylim(record.height, 0)
    name = record.file_name if len(record.file_name) <= 40 else "..." + record.file_name[-37:]
    boxes = "1 box" if len(rows) == 1 else f"{len(rows)} boxes"
    set_label_fonts([axes.set_title(f"{name}: {boxes}", fontsize=9)])
