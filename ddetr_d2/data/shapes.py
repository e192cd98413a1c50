"""Images of shapes on textured backgrounds, drawn at random."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from ..errors import UserError

CLASSES = ("circle", "square", "triangle", "star", "ring", "cross")
SPLITS = ("train", "val")

_SUPERSAMPLING = 4
# Sides of an object's box in pixels, about COCO's small, medium and large, and how often each is.
_SIDES = ((24.0, 32.0), (32.0, 96.0), (96.0, 160.0))
_SIDE_WEIGHTS = (0.2, 0.5, 0.3)
_MIN_INSIDE = 0.75  # of an object's extent, inside the image
_MIN_VISIBLE = 0.6  # of an object's pixels, not covered by later objects
_MAX_IOU = 0.5  # of two objects' boxes
_MIN_CONTRAST = 45.0  # Euclidean distance in CIE L*a*b* from what surrounds an object
_EMPTY_IMAGES = 0.03


@dataclass(frozen=True)
class SyntheticOptions:
    """What an image depends on beside its split and index; sizes in pixels."""

    seed: int = 0
    min_size: int = 160
    max_size: int = 224
    max_objects: int = 6

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"seed {self.seed} is negative: give 0 or more")
        if not 32 <= self.min_size <= self.max_size <= 4096:
            raise UserError(
                f"image sizes from {self.min_size} to {self.max_size} pixels: "
                "give 32 <= minimum <= maximum <= 4096"
            )
        if not 1 <= self.max_objects <= 100:
            raise UserError(f"at most {self.max_objects} objects an image: give 1 to 100")


@dataclass(frozen=True)
class SyntheticObject:
    """One drawn shape: index into :data:`CLASSES` and box (x0, y0, x1, y1) in pixels."""

    class_index: int
    box: tuple[float, float, float, float]


def draw_image(
    options: SyntheticOptions, split: str, index: int
) -> tuple[np.ndarray, list[SyntheticObject]]:
    """Draw image ``index`` of ``split`` ("train" or "val").

    Returns:
        the image, (H, W, 3) uint8 in OpenCV's BGR order, and its objects. A box is the object's
        full extent, whatever covers it, clipped to the image.
    """
    rng = np.random.default_rng([options.seed, SPLITS.index(split), index])
    height, width = rng.integers(options.min_size, options.max_size, size=2, endpoint=True)
    canvas = _background(rng, int(height), int(width))
    for _ in range(rng.integers(0, 5)):
        _draw_distractor(rng, canvas)
    wanted = 0
    if rng.random() >= _EMPTY_IMAGES:
        wanted = int(rng.integers(1, options.max_objects, endpoint=True))
    objects = _draw_objects(rng, canvas, wanted)
    if rng.random() < 0.3:
        canvas = cv2.GaussianBlur(canvas, (3, 3), rng.uniform(0.3, 0.7))
    canvas += rng.normal(0, rng.uniform(1, 6), canvas.shape).astype(np.float32)
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), objects


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float32: two similar colours mixed by a gradient, stripes or clouds, and grain."""
    first = rng.uniform(20, 235, 3)
    second = np.clip(first + rng.normal(0, 25, 3), 0, 255)
    kind = rng.choice(["plain", "gradient", "stripes", "clouds"], p=[0.1, 0.3, 0.3, 0.3])
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    along = math.cos(angle) * x + math.sin(angle) * y
    if kind == "plain":
        mix = np.zeros_like(along)
    elif kind == "gradient":
        mix = (along - along.min()) / np.ptp(along)
    elif kind == "stripes":
        period = rng.uniform(6, 40)
        mix = 0.5 + 0.5 * np.sin(along * (2 * math.pi / period))
    else:
        cells = rng.integers(3, 16, size=2)
        mix = cv2.resize(
            rng.random(cells, dtype=np.float32), (width, height), interpolation=cv2.INTER_CUBIC
        )
    canvas = first + mix[..., None] * (second - first)
    canvas += rng.normal(0, rng.uniform(0, 8), (height, width, 1))
    return np.clip(canvas, 0, 255).astype(np.float32)


def _draw_distractor(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Something that is no object: a line, a curve, a row of strokes or an oblong blob."""
    height, width = canvas.shape[:2]
    start = rng.uniform((2, 2), (width - 2, height - 2))
    angle = rng.uniform(0, 2 * math.pi)
    direction = np.array((math.cos(angle), math.sin(angle)))
    across = np.array((-direction[1], direction[0]))
    color = rng.uniform(0, 255, 3)
    kind = rng.choice(["line", "curve", "strokes", "blob"])
    if kind == "blob":
        t = np.linspace(0, 2 * math.pi, 40, endpoint=False)
        length = rng.uniform(6, 24)
        wobble = 1 + 0.25 * np.sin(3 * t + rng.uniform(0, 6)) + 0.15 * np.sin(5 * t)
        outline = np.outer(np.cos(t) * wobble, direction) * length
        outline += np.outer(np.sin(t) * wobble, across) * length / rng.uniform(3, 4.5)
        _blend(canvas, [start + outline], color)
        return
    if kind == "line":
        lines = [np.stack((start, start + direction * rng.uniform(20, width)))]
    elif kind == "curve":
        turns = angle + np.cumsum(rng.normal(0, 0.35, 16))
        steps = np.stack((np.cos(turns), np.sin(turns)), axis=1) * rng.uniform(3, 10)
        lines = [start + np.cumsum(steps, axis=0)]
    else:
        letter = rng.uniform(4, 9)
        lines = []
        for i in range(rng.integers(3, 9)):
            points = rng.uniform(-0.5, 0.5, (rng.integers(2, 5), 2)) * letter
            center = start + direction * (i * letter * 1.4)
            lines.append(center + points @ np.stack((direction, across)))
    fixed = [np.rint(line * 16).astype(np.int32) for line in lines]
    thickness = int(rng.integers(1, 3))
    cv2.polylines(canvas, fixed, False, color.tolist(), thickness, cv2.LINE_AA, shift=4)


def _draw_objects(
    rng: np.random.Generator, canvas: np.ndarray, wanted: int
) -> list[SyntheticObject]:
    """Draw up to ``wanted`` objects, each where it leaves those before it recognisable."""
    height, width = canvas.shape[:2]
    objects: list[SyntheticObject] = []
    owner = np.full((height, width), -1, dtype=np.int32)
    total: list[int] = []
    for _ in range(wanted * 3):
        if len(objects) == wanted:
            break
        class_index = int(rng.integers(len(CLASSES)))
        contours = _place(rng, CLASSES[class_index], height, width)
        low = contours[0].min(axis=0)
        high = contours[0].max(axis=0)
        inside_low, inside_high = np.maximum(low, 0), np.minimum(high, (width, height))
        if np.prod(np.maximum(inside_high - inside_low, 0)) < _MIN_INSIDE * np.prod(high - low):
            continue
        coverage, window, box = _coverage(contours, height, width)
        if any(_iou(box, other.box) > _MAX_IOU for other in objects):
            continue
        solid = coverage > 0.5
        visible = np.bincount(owner[owner >= 0], minlength=len(objects))
        covered = owner[window][solid]
        visible -= np.bincount(covered[covered >= 0], minlength=len(objects))
        if any(v < _MIN_VISIBLE * n for v, n in zip(visible, total, strict=True)):
            continue
        color = _contrasting_color(rng, canvas[window])
        _mix(canvas[window], coverage, color, rng)
        owner[window][solid] = len(objects)
        total.append(int(solid.sum()))
        objects.append(SyntheticObject(class_index, box))
    return objects


def _place(rng: np.random.Generator, name: str, height: int, width: int) -> list[np.ndarray]:
    """A shape of random size, rotation and position as contours (P, 2) of (x, y) in pixels."""
    contours = _unit_contours(name)
    angle = rng.uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle), math.sin(angle)
    contours = [c @ np.array(((cos, sin), (-sin, cos))) for c in contours]
    low, high = contours[0].min(axis=0), contours[0].max(axis=0)
    smallest, largest = _SIDES[rng.choice(len(_SIDES), p=_SIDE_WEIGHTS)]
    limit = 0.75 * min(height, width)
    largest = min(largest, limit)
    smallest = min(smallest, 0.75 * limit)
    side = math.exp(rng.uniform(math.log(smallest), math.log(max(largest, smallest + 1))))
    scale = side / math.sqrt(np.prod(high - low))
    center = rng.uniform((0, 0), (width, height)) - scale * (low + high) / 2
    return [c * scale + center for c in contours]


def _unit_contours(name: str) -> list[np.ndarray]:
    """A shape about the origin: its outline, then holes, each (P, 2)."""

    def around(count: int, radius: Sequence[float] = (1.0,)) -> np.ndarray:
        t = np.arange(count) * (2 * math.pi / count)
        return np.resize(radius, count)[:, None] * np.stack((np.cos(t), np.sin(t)), axis=1)

    if name == "circle":
        return [around(72)]
    if name == "ring":
        return [around(72), around(72, (0.55,))]
    if name == "square":
        return [around(4)]
    if name == "triangle":
        return [around(3)]
    if name == "star":
        return [around(10, (1.0, 0.42))]
    if name == "cross":
        arm = 0.32
        quarter = np.array(((1.0, -arm), (1.0, arm), (arm, arm)))
        turn = np.array(((0.0, 1.0), (-1.0, 0.0)))
        corners = [quarter]
        for _ in range(3):
            corners.append(corners[-1] @ turn)
        return [np.concatenate(corners)]
    raise ValueError(f"no shape is called {name!r}: one of {', '.join(CLASSES)}")


def _coverage(
    contours: list[np.ndarray], height: int, width: int
) -> tuple[np.ndarray, tuple[slice, slice], tuple[float, float, float, float]]:
    """How much of each pixel the contours cover, float32 in [0, 1], and the window it stands for.

    Pixel i reaches from i to i + 1. What lies between an outline and a hole in it is covered.
    The third value is the tight box (x0, y0, x1, y1) of the part inside the image, exact to a
    quarter of a pixel.
    """
    low = np.floor(contours[0].min(axis=0)).astype(int).clip(0, (width - 1, height - 1))
    high = np.ceil(contours[0].max(axis=0)).astype(int).clip(low + 1, (width, height))
    columns, rows = high - low
    mask = np.zeros((rows * _SUPERSAMPLING, columns * _SUPERSAMPLING), dtype=np.uint8)
    # OpenCV counts from the centre of the first pixel; 4 fractional bits.
    fine = [np.rint(((c - low) * _SUPERSAMPLING - 0.5) * 16).astype(np.int32) for c in contours]
    cv2.fillPoly(mask, fine, 255, shift=4)
    coverage = cv2.resize(mask, (int(columns), int(rows)), interpolation=cv2.INTER_AREA)
    window = (slice(low[1], high[1]), slice(low[0], high[0]))
    x, y = np.flatnonzero(mask.any(axis=0)), np.flatnonzero(mask.any(axis=1))
    corners = np.array((x[0], y[0], x[-1] + 1, y[-1] + 1)) / _SUPERSAMPLING
    box = tuple((corners + np.concatenate((low, low))).tolist())
    return coverage.astype(np.float32) / 255, window, box


def _blend(canvas: np.ndarray, contours: list[np.ndarray], color: np.ndarray) -> None:
    coverage, window, _ = _coverage(contours, *canvas.shape[:2])
    region = canvas[window]
    region += coverage[..., None] * (color.astype(np.float32) - region)


def _mix(
    region: np.ndarray, coverage: np.ndarray, color: np.ndarray, rng: np.random.Generator
) -> None:
    """Paint ``color``, a little lighter to one side, on ``region`` (h, w, 3) in place."""
    shade = np.linspace(-1, 1, region.shape[1], dtype=np.float32) * np.float32(rng.uniform(-15, 15))
    paint = np.clip(color.astype(np.float32) + shade[None, :, None], 0, 255)
    region += coverage[..., None] * (paint - region)


def _contrasting_color(rng: np.random.Generator, region: np.ndarray) -> np.ndarray:
    """A random BGR colour that differs from every part of ``region`` (h, w, 3)."""
    candidates = rng.uniform(0, 255, (16, 3)).astype(np.float32)
    surroundings = cv2.resize(region, (5, 5), interpolation=cv2.INTER_AREA).reshape(-1, 3)
    lab = cv2.cvtColor(
        np.concatenate((candidates, surroundings))[None] / np.float32(255), cv2.COLOR_BGR2Lab
    )[0]
    distance = np.linalg.norm(lab[:16, None] - lab[None, 16:], axis=2).min(axis=1)
    good = np.flatnonzero(distance >= _MIN_CONTRAST)
    return candidates[good[0] if len(good) else distance.argmax()]


def _iou(a: Sequence[float], b: Sequence[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    area_a = (a[2] - a[0]) * (a[3] - a[1])
    area_b = (b[2] - b[0]) * (b[3] - b[1])
    return both / (area_a + area_b - both)
