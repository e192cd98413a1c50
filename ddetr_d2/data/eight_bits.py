"""Images of more than 8 bits a channel, or of floats, as 8 bits."""

import logging
import math
import mmap

import cv2
import numpy as np
from PIL import Image

logger = logging.getLogger(__name__)

# Formats whose 16-bit colour Pillow cuts down to the upper 8 bits, and OpenCV does not.
_DEEP_COLOUR = ("PNG", "TIFF", "PPM", "JPEG2000")
# Larger floats stand for "no data", as -3.4e38 in satellite images.
_NO_DATA = 1e30

# What has been logged, a byte for each of two messages. Shared memory, so that the workers of a
# data loader, which are forked, do not each say the same.
_LOGGED = mmap.mmap(-1, 2)
# The first range that this process has met, with its file.
_first: list[tuple[float, float, str]] = []


def scale_grey(image: Image.Image, name: str) -> Image.Image:
    """Scale grey of more than 8 bits, or of floats, to 8 bits by the range of its values.

    What is black and what is white is taken from a coarse ladder (:func:`value_range`) instead of
    the image's own minimum and maximum, so that the images of one camera are nearly always scaled
    alike. Images of other modes come back as they are.

    Args:
        image: loaded, of any mode.
        name: the file, for the log: one line for the first image that is scaled, and one if
            another has another range.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    return Image.fromarray(_scale(np.asarray(image), name))


def scale_colour(image: Image.Image, encoded: bytes, name: str) -> None:
    """Scale colour of 16 bits by the range of its values, as :func:`scale_grey` does, in place.

    Pillow reads the upper 8 bits of such files, in which 12 bits are nearly black. Only then they
    are read again, with OpenCV; other images stay as they are.

    Args:
        image: as Pillow has loaded it from ``encoded``, before it is turned upright. (TIFF files
            both libraries turn on loading.)
        encoded: the contents of the file.
        name: the file, for the log.
    """
    if image.format not in _DEEP_COLOUR or image.mode not in ("RGB", "RGBA", "LA"):
        return
    extrema = np.reshape(image.getextrema(), (-1, 2))[: len(image.mode.rstrip("A"))]
    if extrema[:, 1].max() > 64:  # more than 14 bits
        return
    values = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.dtype != np.uint16 or values.ndim != 3:
        return
    channels = [_scale(values[..., 2::-1], name)]  # from BGR
    if values.shape[2] == 4:
        alpha = values[..., 3:].astype(np.int64)
        channels.append((alpha * 255 // int(value_range(alpha)[1])).astype(np.uint8))
    scaled = Image.fromarray(np.concatenate(channels, axis=2)).convert(image.mode)
    image.paste(scaled)


def value_range(values: np.ndarray) -> tuple[float, float]:
    """The values that become black (0) and white (255).

    White is the first of 255, 1023, 4095, 16383, 65535, ... (8, 10, 12, ... bits) that is not
    below the largest value. For floats the steps start lower: ..., 1/256, 1/16, 1, 16, 255, 1023,
    ..., and values may be a tenth above, as resampling leaves them; these become white. So floats
    of 0 to 1, of 0 to 255 and of 0 to 65535 are each taken as what they are.

    Black is 0. Only if values below minus a tenth of white occur, it is minus the step for them.
    Nothing but zeros has the range 0 to 255.

    Args:
        values: any shape; NaN, infinity and beyond 1e30 do not count.
    """
    is_float = values.dtype.kind == "f"
    if is_float:
        values = values[np.abs(values) < _NO_DATA]  # false for NaN
    if not values.any():  # nothing to scale
        return 0.0, 255.0
    smallest, largest = float(values.min()), float(values.max())
    high = _rung(largest, is_float) if largest > 0 else 0.0
    low = 0.0
    if -smallest > high / 10:
        low = -_rung(-smallest if is_float else -smallest - 1, is_float)  # -1024 takes 10 bits
    return low, high


def _rung(value: float, is_float: bool) -> float:
    """The rung of the ladder for a positive value."""
    if is_float:
        value /= 1.1
        if value <= 16:
            return 16.0 ** math.ceil(round(math.log(value, 16), 9))
    return 2.0 ** max(8, 2 * math.ceil(math.log2(value + 1) / 2)) - 1


def _scale(values: np.ndarray, name: str) -> np.ndarray:
    """Values of any shape as uint8."""
    low, high = value_range(values)
    if (low, high) != (0, 255):
        _log(low, high, name)
    if values.dtype.kind == "f":
        values = np.clip(np.nan_to_num(values, nan=low), low, high)
        return np.rint((values - low) * (255 / (high - low))).astype(np.uint8)
    if values.dtype.itemsize == 2:  # a table is ten times as fast as the arithmetic
        return _scale_integers(np.arange(1 << 16), low, high)[values]
    return _scale_integers(values, low, high)


def _scale_integers(values: np.ndarray, low: float, high: float) -> np.ndarray:
    values = (values.astype(np.int64) - int(low)) * 255 // int(high - low)
    return np.clip(values, 0, 255).astype(np.uint8)


def _log(low: float, high: float, name: str) -> None:
    if not _first:
        _first.append((low, high, name))
    if not _LOGGED[0]:
        _LOGGED[0] = 1
        logger.info(
            f"Images of more than 8 bits are scaled by the range that their values need: {name} "
            f"from {low:.6g} (black) to {high:.6g} (white)"
        )
    elif _first[0][:2] != (low, high) and not _LOGGED[1]:
        _LOGGED[1] = 1
        logger.warning(
            f"Images of more than 8 bits need different ranges and differ in brightness for it: "
            f"{name} {low:.6g} to {high:.6g}, {_first[0][2]} {_first[0][0]:.6g} to "
            f"{_first[0][1]:.6g}. If they belong together, save them with 8 bits, scaled alike."
        )
