"""Pictures of where the detector looks: sampling points, or a heat map."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from .heat_map import HeatMap
from .labels import set_label_fonts
from .sampling import SamplingPoints

PANEL_SIZE = 5.0  # inches, the longer side
DPI = 100
COLORS = "plasma"  # dark to bright
MARKER = "#00e000"
# Points with less than this share of the largest weight may lie outside of the view.
NEGLIGIBLE = 0.1
# Around the image at most this share of its longer side is shown.
OUTSIDE = 0.1
MIN_VIEW = 16  # pixels
# Of the image below the cell of a heat map that has the largest weight, so much is hidden.
OPACITY = 0.85


_Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class SamplingPanel:
    """One panel of the picture.

    Attributes:
        title: what is written above it.
        points: what is drawn in it.
        box: (x0, y0, x1, y1) of the detection or of the token's cell, in pixels of the image.
    """

    title: str
    points: SamplingPoints | HeatMap
    box: _Box


def draw_sampling(image: np.ndarray, panels: Sequence[SamplingPanel]) -> np.ndarray:
    """Draw where the detector looks, coloured by attention weight.

    Sampling points are drawn on the part of the image that they lie in, a heat map on the whole.

    Args:
        image: (H, W, 3) uint8 RGB.
        panels: one or more.

    Returns:
        (h, w, 3) uint8 RGB.
    """
    aspect = min(max(image.shape[1] / image.shape[0], 0.5), 2.0)
    width, height = PANEL_SIZE * min(1, aspect), PANEL_SIZE * min(1, 1 / aspect)
    columns = math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    figure = Figure((columns * width + 1, rows * (height + 0.35)), DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(grid.flat, panels, strict=False):
        if isinstance(panel.points, HeatMap):
            _draw_heat_map(axes, image, panel.points)
        else:
            _draw_points(axes, image, panel.points, panel.box, aspect)
        _draw_box(axes, panel.box)
        set_label_fonts([axes.set_title(panel.title, fontsize=11)])
        axes.tick_params(labelsize=8)
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), COLORS), ax=grid, fraction=0.05, aspect=40, pad=0.02
    )
    bar.set_label("attention weight / largest of the panel")
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_image(
    axes: Axes, image: np.ndarray, left: int, top: int, right: int, bottom: int
) -> None:
    """Draw a part of the image. Matplotlib needs a hundred bytes for a pixel: it gets those that
    can be seen."""
    part = Image.fromarray(image[top:bottom, left:right])
    part = part.reduce(math.ceil(max(part.size) / (2 * PANEL_SIZE * DPI)))
    axes.imshow(part, extent=(left, right, bottom, top))


def _draw_box(axes: Axes, box: _Box) -> None:
    x0, y0, x1, y1 = box
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=MARKER, linewidth=2))


def _draw_heat_map(axes: Axes, image: np.ndarray, heat_map: HeatMap) -> None:
    height, width = image.shape[:2]
    # Without its own colours, which would mix with those of the weights.
    grey = np.asarray(Image.fromarray(image).convert("L").convert("RGB"))
    _draw_image(axes, grey, 0, 0, width, height)
    covered_width, covered_height = heat_map.size
    weights = heat_map.weights.numpy()
    share = weights / weights.max()
    axes.imshow(
        share,
        cmap=COLORS,
        vmin=0,
        vmax=1,
        alpha=OPACITY * share,
        extent=(0, covered_width, covered_height, 0),
        interpolation="nearest",
    )
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)


def _draw_points(
    axes: Axes, image: np.ndarray, points: SamplingPoints, box: _Box, aspect: float
) -> None:
    locations = points.locations.flatten(0, -2).numpy()
    weights = points.weights.flatten().numpy()
    reference = points.reference.numpy()
    order = weights.argsort()  # the largest are drawn last
    locations, weights = locations[order], weights[order]
    seen = locations[weights >= NEGLIGIBLE * weights.max()]
    seen = np.concatenate((seen, np.reshape(box, (2, 2)), reference[None]))
    low, high = _view(seen, image.shape[:2], aspect)

    left, top = np.maximum(low, 0).astype(int)
    right, bottom = np.minimum(np.ceil(high).astype(int), image.shape[1::-1])
    _draw_image(axes, image, left, top, right, bottom)
    share = weights / weights[-1]
    axes.scatter(
        locations[:, 0],
        locations[:, 1],
        c=share,
        s=16 + 44 * share,
        cmap=COLORS,
        vmin=0,
        vmax=1,
        # Dark points stand out from dark images, bright ones from bright images.
        edgecolors=np.where(share < 0.5, "white", "black").tolist(),
        linewidths=0.6,
    )
    axes.plot(
        *reference.tolist(),
        marker="+",
        markersize=14,
        markeredgewidth=2,
        color=MARKER,
        path_effects=[patheffects.withStroke(linewidth=4, foreground="black")],
    )
    axes.set_xlim(low[0], high[0])
    axes.set_ylim(high[1], low[1])
    axes.set_facecolor("0.85")
    hidden = weights[((locations < low) | (locations > high)).any(1)].sum() / weights.sum()
    if hidden >= 0.005:
        axes.set_xlabel(f"{hidden:.0%} of the weight lies outside of this view", fontsize=8)


def _view(
    seen: np.ndarray, image_size: tuple[int, int], aspect: float
) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper (x, y) of a panel that shows the positions ``seen`` (P, 2), with a margin."""
    low, high = seen.min(0), seen.max(0)
    width, height = np.maximum(1.15 * (high - low), MIN_VIEW)
    size = np.array([max(width, height * aspect), max(height, width / aspect)])
    center = (low + high) / 2
    margin = OUTSIDE * max(image_size)
    border = np.array(image_size[::-1])
    return np.maximum(center - size / 2, -margin), np.minimum(center + size / 2, border + margin)
