"""Reading image files of every common kind, with an error that names the file."""

import struct
import zlib
from pathlib import Path

import numpy as np
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image, UnidentifiedImageError

from ..errors import UserError

# What Pillow raises on damaged files, depending on their kind.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def read_image(path: str | Path, format: str = "RGB") -> np.ndarray:
    """Read an image upright, as Detectron2's function of this name does, and more kinds of them.

    The orientation in EXIF data is applied. Grey, palette and CMYK images are converted;
    transparency is laid on white; 16-bit grey is scaled to 8 bits rather than cut off at 255.
    Of an animation the first picture is read.

    Args:
        path: the file.
        format: "RGB", "BGR", or another one that Detectron2 knows (``INPUT.FORMAT``).

    Returns:
        (H, W, 3) uint8 for "RGB" and "BGR".

    Raises:
        UserError: the file is missing, is no image, or is cut short or damaged otherwise.
    """
    try:
        with PathManager.open(str(path), "rb") as file, Image.open(file) as image:
            image.load()
            return convert_PIL_to_numpy(_to_eight_bits(_apply_exif_orientation(image)), format)
    except FileNotFoundError as error:
        raise UserError(f"image file {path} does not exist") from error
    except UnidentifiedImageError as error:
        raise UserError(f"file {path} is no image, or of an unknown kind") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"image file {path} is too large: {error}") from error
    except _DAMAGED as error:
        raise UserError(f"image file {path} is cut short or damaged: {error}") from error


def check_image_size(record: dict, image: np.ndarray) -> None:
    """Check that ``image`` (H, W, ...) has the size its record in the data set gives.

    Raises:
        UserError: it has another size.
    """
    height, width = image.shape[:2]
    expected = (record.get("width", width), record.get("height", height))
    if (width, height) == expected:
        return
    message = (
        f"image file {record['file_name']} has {width} x {height} pixels, but the annotation file "
        f"says {expected[0]} x {expected[1]}"
    )
    if (height, width) == expected:
        message += (
            " (images are turned upright as their EXIF orientation says: annotate the upright "
            "image, or remove the orientation from the file)"
        )
    raise UserError(message)


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """An image of 8-bit channels without transparency."""
    if image.mode.startswith("I"):  # 16-bit grey, in 16 or 32 bits
        values = np.asarray(image)
        if image.mode != "I" or values.max() > 255:
            values = np.clip(values // 257, 0, 255)
        return Image.fromarray(values.astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image
