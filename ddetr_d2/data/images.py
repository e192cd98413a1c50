"""Reading image files of every kind that Pillow decodes, with an error that names the file."""

import functools
import io
from pathlib import Path

import numpy as np
from detectron2.data.detection_utils import _apply_exif_orientation, convert_PIL_to_numpy
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageFile, UnidentifiedImageError

from ..errors import UserError
from .eight_bits import scale_colour, scale_grey

# EPS is a drawing that another program would have to render; of MPEG Pillow reads the size only.
_NOT_DECODED = ("EPS", "MPEG")


@functools.cache
def readable_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that :func:`read_image` decodes, such as "JPEG".

    Left out are those that Pillow recognises but cannot decode by itself (HDF5, GRIB, WMF, EPS and
    others). Formats with a signature come before those without, such as TGA.
    """
    Image.init()
    formats = [
        name
        for name, (reader, _) in Image.OPEN.items()
        if name not in _NOT_DECODED
        and not (isinstance(reader, type) and issubclass(reader, ImageFile.StubImageFile))
    ]
    return tuple(sorted(formats, key=lambda name: (not _has_signature(name), name)))


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of files of :func:`readable_formats`, such as ".jpg", in lower case."""
    readable = {*readable_formats(), "MPO"}  # which is read as JPEG
    return frozenset(s for s, name in Image.registered_extensions().items() if name in readable)


def is_image(path: str | Path) -> bool:
    """Whether a file begins as an image of :func:`readable_formats` does, whatever its suffix.

    Formats without a signature are not recognised: other files could pass for them.
    """
    try:
        with Image.open(path, formats=list(filter(_has_signature, readable_formats()))):
            return True
    except Image.DecompressionBombError:
        return True
    except Exception:  # Pillow's readers raise errors of any type on damaged headers
        return False


def _has_signature(name: str) -> bool:
    return Image.OPEN[name][1] is not None


def read_image(path: str | Path, format: str = "RGB") -> np.ndarray:
    """Read an image upright, as Detectron2's function of this name does, and more kinds of them.

    The orientation in EXIF data is applied. Grey, palette and CMYK images are converted;
    transparency is laid on white; 16 bits and floats are scaled to 8 bits by the range of their
    values (:func:`~ddetr_d2.data.eight_bits.value_range`) rather than cut off at 255. Images of 8
    bits without transparency have the pixels that Detectron2 reads. Of an animation the first
    picture is read, of a TIFF file the first page.

    Args:
        path: the file.
        format: "RGB", "BGR", or another one that Detectron2 knows (``INPUT.FORMAT``).

    Returns:
        (H, W, 3) uint8 for "RGB" and "BGR".

    Raises:
        UserError: the file is missing, is no image, or is cut short or damaged otherwise.
    """
    try:
        with PathManager.open(str(path), "rb") as file:
            encoded = file.read()
    except FileNotFoundError as error:
        raise UserError(f"image file {path} does not exist") from error
    except OSError as error:
        raise UserError(f"image file {path} cannot be opened: {error.strerror}") from error
    image = _load(encoded, path)
    scale_colour(image, encoded, str(path))
    return as_array(_apply_exif_orientation(image), format, str(path))


def as_array(image: Image.Image, format: str = "RGB", name: str = "an image") -> np.ndarray:
    """Convert a Pillow image as :func:`read_image` converts those of files, but for EXIF data.

    Args:
        image: of any mode.
        format: as in :func:`read_image`.
        name: what to call it in the log.
    """
    return convert_PIL_to_numpy(_lay_on_white(scale_grey(image, name)), format)


def _load(encoded: bytes, path: str | Path) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(encoded), formats=readable_formats())
        image.load()
    except UnidentifiedImageError as error:
        raise UserError(f"file {path} is no image, or of an unknown kind") from error
    except (Image.DecompressionBombError, MemoryError) as error:
        raise UserError(f"image file {path} is too large: {error}") from error
    except Exception as error:  # Pillow's readers raise errors of any type on damaged files
        raise UserError(f"image file {path} is cut short or damaged: {error}") from error
    return image


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


def _lay_on_white(image: Image.Image) -> Image.Image:
    """An image without transparency."""
    if image.mode == "La":  # which Pillow converts to this mode only
        image = image.convert("LA")
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image
