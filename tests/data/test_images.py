"""Image files of every kind, and damaged ones."""

from ddetr_d2.data.images import (
    check_image_size,
    image_suffixes,
    is_image,
    read_image,
    readable_formats,
)
from ddetr_d2.errors import UserError

import numpy as np
import pytest
from detectron2.data.detection_utils import read_image as detectron2_read_image
from PIL import Image, ImageCms

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (30, 20, 3), dtype=np.uint8)


def saved(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
@pytest.mark.parametrize("format", ["RGB", "BGR"])
def test_common_kinds_as_detectron2_reads_them(tmp_path, mode, format):
    path = saved(tmp_path, Image.fromarray(RGB).convert(mode))
    image = read_image(path, format)
    assert image.shape == (30, 20, 3) and image.dtype == np.uint8
    np.testing.assert_array_equal(image, detectron2_read_image(str(path), format))


def test_cmyk(tmp_path):
    flat = Image.new("RGB", (20, 30), (200, 30, 60)).convert("CMYK")
    image = read_image(saved(tmp_path, flat, "image.jpg"))
    assert np.abs(image.astype(int) - (200, 30, 60)).max() < 8


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "1", "L", "P"])
def test_colour_spaces_as_detectron2_reads_them(tmp_path, mode):
    image = Image.fromarray(RGB)
    if mode == "LAB":
        spaces = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, *spaces, outputMode="LAB")
    path = saved(tmp_path, image.convert(mode), "image.tif")
    assert Image.open(path).mode == mode
    np.testing.assert_array_equal(read_image(path), detectron2_read_image(str(path), "RGB"))


@pytest.mark.parametrize(
    "name, format",
    [
        ("a.jfif", "JPEG"),
        ("a.jpe", "JPEG"),
        ("a.mpo", "MPO"),
        ("a.gif", "GIF"),
        ("a.avif", "AVIF"),
        ("a.jp2", "JPEG2000"),
        ("a.tga", "TGA"),
        ("a.ico", "ICO"),
        ("a.pcx", "PCX"),
        ("a.dds", "DDS"),
        ("a.sgi", "SGI"),
        ("a.xbm", "XBM"),
        ("a.qoi", "QOI"),
        ("a.webp", "WEBP"),
        ("a.pnm", "PPM"),
    ],
)
def test_formats(tmp_path, name, format):
    image = Image.new("1" if format == "XBM" else "RGB", (32, 32), 1)
    path = saved(tmp_path, image, name, format=format)
    assert path.suffix in image_suffixes()
    assert read_image(path).shape == (32, 32, 3)
    assert is_image(path) == (format != "TGA")  # which has no signature


def test_suffixes_are_those_of_what_can_be_decoded():
    assert {".jpg", ".png", ".tif", ".bmp", ".psd", ".fits", ".j2k"} < image_suffixes()
    # Recognised by Pillow, or written by it, but not decoded.
    assert not {".pdf", ".eps", ".mpg", ".h5", ".wmf", ".grib", ".palm"} & image_suffixes()


def test_contents_of_files_with_other_suffixes(tmp_path):
    assert is_image(saved(tmp_path, Image.fromarray(RGB), "image", format="PNG"))
    for content in (b"", b"text", b"%PDF-1.7", b"%!PS-Adobe-3.0 EPSF-3.0", bytes(1000)):
        (tmp_path / "other").write_bytes(content)
        assert not is_image(tmp_path / "other")
    assert not is_image(tmp_path / "missing")
    assert not is_image(tmp_path)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_parts_are_white(tmp_path, mode):
    rgba = np.zeros((4, 6, 4), dtype=np.uint8)
    rgba[:, 3:] = (90, 90, 90, 255)
    path = saved(tmp_path, Image.fromarray(rgba).convert(mode))
    image = read_image(path)
    assert (image[:, :3] == 255).all()
    assert (image[:, 3:] == 90).all()


def test_opaque_alpha_changes_nothing(tmp_path):
    path = saved(tmp_path, Image.fromarray(RGB).convert("RGBA"))
    np.testing.assert_array_equal(read_image(path), RGB)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled(tmp_path, suffix):
    values = np.linspace(0, 65535, 600).astype(np.uint16).reshape(30, 20)
    image = read_image(saved(tmp_path, Image.fromarray(values), f"image.{suffix}"))
    assert image.shape == (30, 20, 3)
    np.testing.assert_array_equal(image[..., 0], values // 257)
    assert image.min() == 0 and image.max() == 255 and (image == 255).mean() < 0.01


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(RGB), exif=exif)
    image = read_image(path)
    assert image.shape[:2] == ((30, 20) if orientation < 5 else (20, 30))
    np.testing.assert_array_equal(image, detectron2_read_image(str(path), "RGB"))


@pytest.mark.parametrize("size", [(1, 50), (50, 1), (1, 1)])
def test_one_pixel_wide(tmp_path, size):
    assert read_image(saved(tmp_path, Image.new("RGB", size))).shape == (size[1], size[0], 3)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "gif", "webp"])
@pytest.mark.parametrize("part", [0.3, 0.6, 0.9])
def test_cut_short(tmp_path, suffix, part):
    pixels = RNG.integers(0, 256, (120, 160, 3), dtype=np.uint8)
    path = saved(tmp_path, Image.fromarray(pixels), f"image.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    with pytest.raises(UserError, match=str(path)):
        read_image(path)


@pytest.mark.parametrize("format", [f for f in readable_formats() if f in Image.SAVE])
def test_damaged(tmp_path, format):
    """Files with wrong bytes are read or refused with a :class:`UserError`."""
    rng = np.random.default_rng(0)
    mode = {"BLP": "P", "MSP": "1", "XBM": "1"}.get(format, "RGB")
    path = saved(tmp_path, Image.fromarray(RGB).convert(mode), "image", format=format)
    content = np.frombuffer(path.read_bytes(), np.uint8)
    for _ in range(20):
        damaged = content.copy()
        positions = rng.integers(0, min(len(content), int(rng.choice([20, 200, 2000]))), 3)
        damaged[positions] = rng.choice([0, 255, *rng.integers(0, 256, 3)], 3)
        path.write_bytes(damaged[: rng.integers(1, 2 * len(content))])
        try:
            pixels = read_image(path)
        except UserError as error:
            assert str(path) in str(error)
        else:
            assert pixels.dtype == np.uint8 and pixels.shape[2] == 3


def test_too_many_pixels(tmp_path):
    (tmp_path / "huge.pbm").write_bytes(b"P4 20000 20000 ")
    assert is_image(tmp_path / "huge.pbm")
    with pytest.raises(UserError, match="huge.pbm is too large"):
        read_image(tmp_path / "huge.pbm")


def test_missing_empty_and_no_image(tmp_path):
    path = tmp_path / "image.jpg"
    with pytest.raises(UserError, match=f"image file {path} does not exist"):
        read_image(path)
    for content in (b"", b"<html>not found</html>"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"file {path} is no image"):
            read_image(path)
    with pytest.raises(UserError, match=str(tmp_path)):
        read_image(tmp_path)


def test_size_differs_from_the_annotation():
    record = {"file_name": "a.jpg", "width": 20, "height": 30}
    check_image_size(record, RGB)
    check_image_size({"file_name": "a.jpg"}, RGB)
    record["width"] = 25
    with pytest.raises(UserError, match=r"a.jpg has 20 x 30 pixels, .* says 25 x 30$"):
        check_image_size(record, RGB)
    record.update(width=30, height=20)
    with pytest.raises(UserError, match=r"has 20 x 30 pixels, .* says 30 x 20 .*EXIF orientation"):
        check_image_size(record, RGB)
