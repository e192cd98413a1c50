"""Images of more than 8 bits and of floats."""

import logging
import struct
import zlib

from ddetr_d2.data import eight_bits
from ddetr_d2.data.eight_bits import value_range
from ddetr_d2.data.images import read_image

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

RNG = np.random.default_rng(0)
SHAPE = (20, 30)


@pytest.fixture(autouse=True)
def nothing_logged_yet(monkeypatch):
    monkeypatch.setattr(eight_bits, "_first", [])
    eight_bits._LOGGED[:] = bytes(2)


def values_up_to(largest, dtype=np.uint16, channels=()):
    values = RNG.integers(0, largest + 1, (*SHAPE, *channels)).astype(dtype)
    values.flat[:6] = [largest] * 3 + [0] * 3
    return values


@pytest.mark.parametrize(
    "smallest, largest, dtype, expected",
    [
        (0, 200, np.uint16, (0, 255)),
        (0, 256, np.uint16, (0, 1023)),
        (0, 4095, np.uint16, (0, 4095)),
        (0, 4096, np.uint16, (0, 16383)),
        (0, 65535, np.uint16, (0, 65535)),
        (0, 10**6, np.int32, (0, 2**20 - 1)),
        (700, 700, np.uint16, (0, 1023)),
        (0, 0, np.uint16, (0, 255)),
        (-5, 4000, np.int32, (0, 4095)),  # noise of a dark camera
        (-1024, 3071, np.int32, (-1023, 4095)),  # computed tomography
        (-50, -1, np.int32, (-255, 0)),
        (0, 1, np.float32, (0, 1)),
        (0, 0.3, np.float32, (0, 1)),
        (0, 1.05, np.float32, (0, 1)),
        (-0.02, 1, np.float32, (0, 1)),
        (-1, 1, np.float32, (-1, 1)),
        (0, 0.01, np.float32, (0, 1 / 16)),
        (0, 10, np.float32, (0, 16)),
        (0, 60, np.float32, (0, 255)),
        (0, 255, np.float32, (0, 255)),
        (0, 4000, np.float32, (0, 4095)),
        (0, 65535, np.float32, (0, 65535)),
    ],
)
def test_range_of_values(smallest, largest, dtype, expected):
    assert value_range(np.array([smallest, largest], dtype)) == pytest.approx(expected)


def test_range_ignores_what_is_no_number():
    values = np.array([np.nan, np.inf, -np.inf, -3.4e38, 0.2, 0.9], np.float32)
    assert value_range(values) == (0, 1)
    assert value_range(values[:4]) == (0, 255)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_12_bit_grey(tmp_path, suffix):
    values = values_up_to(4095)
    path = str(tmp_path / f"image.{suffix}")
    cv2.imwrite(path, values)
    np.testing.assert_array_equal(read_image(path)[..., 1], values.astype(int) * 255 // 4095)


def test_big_endian_tiff(tmp_path):
    values = values_up_to(1000, np.int32)
    image = Image.fromarray(values).convert("I;16B")
    image.save(tmp_path / "image.tif")
    assert Image.open(tmp_path / "image.tif").mode == "I;16B"
    pixels = read_image(tmp_path / "image.tif")[..., 0]
    np.testing.assert_array_equal(pixels, values * 255 // 1023)


@pytest.mark.parametrize("suffix", ["png", "tif", "ppm"])
@pytest.mark.parametrize("largest", [200, 4095, 65535])
def test_16_bit_colour(tmp_path, suffix, largest):
    values = values_up_to(largest, channels=(3,))
    path = str(tmp_path / f"image.{suffix}")
    cv2.imwrite(path, values)
    white = {200: 255, 4095: 4095, 65535: 65535}[largest]
    pixels = read_image(path, "BGR").astype(int)
    # Of full range Pillow's upper 8 bits are kept, which are up to one more.
    assert np.abs(pixels - values.astype(int) * 255 // white).max() <= (largest == 65535)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("opaque", [4095, 65535])
def test_16_bit_colour_with_transparency(tmp_path, suffix, opaque):
    values = values_up_to(4095, channels=(4,))
    values[..., 3] = opaque
    values[0, :, 3] = 0
    path = str(tmp_path / f"image.{suffix}")
    cv2.imwrite(path, values)
    pixels = read_image(path, "BGR")
    assert (pixels[0] == 255).all()
    np.testing.assert_array_equal(pixels[1:], values[1:, :, :3].astype(int) * 255 // 4095)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_orientation(tmp_path, suffix, channels, orientation):
    """As an image of 8 bits with this orientation."""
    values = values_up_to(4095, channels=channels)
    eight = Image.fromarray((values.astype(int) * 255 // 4095).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    eight.save(tmp_path / "8.png", exif=exif)
    path = tmp_path / f"16.{suffix}"
    cv2.imwrite(str(path), values[..., ::-1] if channels else values)
    path.write_bytes(with_orientation(path.read_bytes(), exif, orientation))
    np.testing.assert_array_equal(read_image(path), read_image(tmp_path / "8.png"))


def with_orientation(encoded, exif, orientation):
    """A PNG or TIFF file of OpenCV's with an orientation added, its 16-bit pixels as they are."""
    if encoded.startswith(b"\x89PNG"):
        chunk = b"eXIf" + exif.tobytes()[6:]
        chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        return encoded[:33] + chunk + encoded[33:]  # behind the header
    # A new directory at the end, with one entry more.
    (start,) = struct.unpack("<I", encoded[4:8])
    (count,) = struct.unpack("<H", encoded[start : start + 2])
    entries = [encoded[start + 2 + 12 * i : start + 14 + 12 * i] for i in range(count)]
    entries.append(struct.pack("<HHII", 0x0112, 3, 1, orientation))
    entries.sort(key=lambda entry: struct.unpack("<H", entry[:2]))
    encoded += b"\0" * (len(encoded) % 2)
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return encoded[:4] + struct.pack("<I", len(encoded)) + encoded[8:] + directory


@pytest.mark.parametrize("scale", [1 / 255, 1, 257])
def test_floats_that_were_8_bits(tmp_path, scale):
    original = values_up_to(255, np.uint8)
    Image.fromarray(original.astype(np.float32) * scale).save(tmp_path / "image.tif")
    pixels = read_image(tmp_path / "image.tif")
    np.testing.assert_array_equal(pixels, original[..., None].repeat(3, 2))


def test_floats_that_are_no_numbers(tmp_path, recwarn):
    values = np.full(SHAPE, 0.5, np.float32)
    values[0, :5] = np.nan, np.inf, -np.inf, -3.4e38, 1
    Image.fromarray(values).save(tmp_path / "image.tif")
    pixels = read_image(tmp_path / "image.tif")[..., 0]
    assert pixels[0, :6].tolist() == [0, 255, 0, 0, 255, 128]
    assert not [w for w in recwarn if issubclass(w.category, RuntimeWarning)]


def test_dark_images_of_8_bits_stay(tmp_path, caplog):
    values = values_up_to(15, np.uint8, (3,))
    cv2.imwrite(str(tmp_path / "image.png"), values)
    with caplog.at_level(logging.INFO, "ddetr_d2"):
        np.testing.assert_array_equal(read_image(tmp_path / "image.png", "BGR"), values)
    assert not caplog.records


def test_the_log_says_it_once_and_once_more_for_another_range(tmp_path, caplog):
    for name, largest in (("a", 4095), ("b", 4000), ("c", 60000), ("d", 900), ("e", 200)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), values_up_to(largest))
    with caplog.at_level(logging.INFO, "ddetr_d2"):
        for path in sorted(tmp_path.iterdir()):
            read_image(path)
    first, second = (record.getMessage() for record in caplog.records)
    assert "a.png" in first and "4095" in first
    assert "c.png" in second and "65535" in second and "a.png" in second


def test_workers_of_a_data_loader_say_it_once(tmp_path):
    paths = [str(tmp_path / f"{i}.png") for i in range(8)]
    for path in paths:
        cv2.imwrite(path, values_up_to(4095))
    handler = logging.FileHandler(tmp_path / "log.txt")
    logger = logging.getLogger("ddetr_d2")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        loader = torch.utils.data.DataLoader(
            paths, None, num_workers=2, collate_fn=read_image, multiprocessing_context="fork"
        )
        assert len(list(loader)) == 8
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert (tmp_path / "log.txt").read_text().count("\n") == 1
