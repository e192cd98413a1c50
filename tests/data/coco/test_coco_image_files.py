"""Finding the image files of a data set, and reading their headers."""

import os
import shutil
import sqlite3
import struct
import unicodedata
import zlib

from ddetr_d2.data.coco import image_files
from ddetr_d2.data.coco.image_files import ImageHeader, find_image_files, read_header, read_headers
from ddetr_d2.data.images import read_image
from ddetr_d2.errors import UserError

import numpy as np
import pytest
from PIL import Image, ImageFile


def tree(root, *files: str) -> str:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return str(root)


NFC, NFD = (unicodedata.normalize(form, "Käse.jpg") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("sub/a.jpg", "sub\\a.jpg"),
        ("sub/a.jpg", ".\\sub\\a.jpg"),
        ("my image (1).jpg", "my%20image%20%281%29.jpg"),
        ("100%25.jpg", "100%25.jpg"),
        (NFC, NFD),
        (NFD, NFC),
        (NFD, "K%C3%A4se.jpg"),
        ("A.JPG", "a.jpg"),
        ("a.jpg", "A.JPG"),
        ("a.jpg", "a.jpg "),
        ("a.jpg", "images/a.jpg"),
        ("a.jpg", "images/./a.jpg"),
        ("sub/a.jpg", "images/sub/a.jpg"),
        ("a.jpg", "/home/somebody/data/images/a.jpg"),
        ("a.jpg", "C:\\Users\\somebody\\images\\a.jpg"),
        ("a.jpg", "\\\\server\\share\\a.jpg"),
        ("a.jpg", "file:///home/somebody/a.jpg"),
        ("a.jpg", "https://example.org/images/a.jpg"),
        ("sub/a.jpg", "/data/local-files/?d=images/sub/a.jpg"),
        ("sub/a b.jpg", "/data/local-files/?d=sub%2Fa%20b.jpg"),
        ("sub/a.jpg", "/data/local-files/?d=sub\\a.jpg"),
        ("a.jpg", "/data/upload/1/a.jpg"),
    ],
)
def test_names_written_in_another_way(tmp_path, file, name):
    root = tree(tmp_path / "images", file, "other.jpg", "sub/other.jpg")
    changed = int(file != name)
    assert find_image_files(root, [name]) == ([os.path.join(root, file)], changed)
    # The name itself goes before other ways to write it.
    exact = tree(tmp_path / "images", name) if not name.startswith("/") and " " not in name else ""
    if exact:
        assert find_image_files(root, [name]) == ([os.path.join(root, name)], 0)


def test_two_names_that_would_become_one_file(tmp_path):
    root = tree(tmp_path / "images", "a.jpg", "b.jpg")
    here = os.path.join(root, "a.jpg")
    assert find_image_files(root, ["1/a.jpg", "2/a.jpg"]) == ([None, None], 0)
    assert find_image_files(root, ["a.jpg", "2/a.jpg"]) == ([here, None], 0)
    dotted = os.path.join(root, "./a.jpg")
    assert find_image_files(root, ["./a.jpg", "2/a.jpg"]) == ([dotted, None], 0)
    assert find_image_files(root, ["A.jpg", "A.JPG"]) == ([None, None], 0)


def test_one_name_that_could_be_two_files(tmp_path):
    root = tree(tmp_path / "images", "A.jpg", "a.jpg", "1/b.jpg", "2/b.jpg")
    assert find_image_files(root, ["a.JPG", "3/b.jpg", "b.jpg"]) == ([None] * 3, 0)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "/", "no.jpg", "a.jpg/", "\0", "x" * 5000, "a.jpg/a.jpg", "\ud800.jpg"]
)
def test_names_of_no_file(tmp_path, name):
    root = tree(tmp_path / "images", "sub/b.jpg", "c.jpg")
    assert find_image_files(root, [name, "c.jpg"]) == ([None, os.path.join(root, "c.jpg")], 0)


def test_links_that_lead_round_in_a_circle(tmp_path):
    root = tree(tmp_path / "images", "a.jpg", *(f"{i}/b{i}.jpg" for i in range(4)))
    for i in range(4):
        (tmp_path / "images" / str(i) / "up").symlink_to(root, target_is_directory=True)
    (tmp_path / "images" / "broken").symlink_to(tmp_path / "nowhere")
    assert find_image_files(root, ["x/a.jpg"]) == ([os.path.join(root, "a.jpg")], 1)


def test_linked_folders_and_files(tmp_path):
    store = tree(tmp_path / "store", "a.jpg", "b.jpg")
    images = tmp_path / "images"
    images.mkdir()
    (images / "linked").symlink_to(store, target_is_directory=True)
    (images / "c.jpg").symlink_to(tmp_path / "store" / "b.jpg")
    found = [str(images / "linked/a.jpg"), str(images / "c.jpg"), str(images / "linked/b.jpg")]
    names = ["linked/a.jpg", "c.jpg", "x\\linked\\b.jpg"]
    assert find_image_files(str(images), names) == (found, 1)


def test_names_of_the_annotation_file_stay(coco, read):
    coco.content["images"][0]["file_name"] = "images\\A.png"
    found = read()
    assert (found.images[0].file_name, found.images[0].path) == (
        "images\\A.png",
        str(coco.images / "a.png"),
    )
    assert found.summary() == "image files were found under a name written in another way: 1"


def test_missing_files(coco, refusal):
    (coco.images / "a.png").unlink()
    assert "1 of 3 image files is missing from the image folder" in refusal()
    coco.content["images"][1]["file_name"] = "no\nsuch/c.png"
    message = refusal()
    assert "2 of 3 image files are missing" in message
    assert message.endswith(rf"{coco.images}: a.png, 'no\nsuch/c.png'; correct the path")


def test_files_of_similar_names_are_shown(coco, refusal):
    (coco.images / "a.png").rename(coco.images / "A.png")
    shutil.copy(coco.images / "A.png", coco.images / "a.PNG")
    (coco.images / "b.png").rename(coco.images / "b.jpg")
    message = refusal()
    assert "2 of 3 image files are missing" in message
    assert "a.png (there are A.png and a.PNG), b.png (there is b.jpg)" in message


def test_unreadable_files(coco, refusal):
    (coco.images / "a.png").write_bytes(b"")
    (coco.images / "b.png").write_text("<html>404 Not Found</html>")
    message = refusal()
    expected = "2 of 3 image files cannot be read: a.png (no image, or of an unknown kind), b.png ("
    assert expected in message
    assert message.endswith("replace them, or take them out of the annotation file")


@pytest.mark.parametrize("absent", [None, 0, "", "wide", -5, "absent", float("nan"), 1e400, []])
def test_sizes_out_of_the_files(coco, read, absent):
    for image in coco.content["images"][:2]:
        image.update(width=absent, height=absent)
    if absent == "absent":
        for key in ("width", "height"):
            del coco.content["images"][0][key]
    found = read()
    assert [(i.width, i.height) for i in found.images] == [(60, 40), (30, 50), (20, 20)]
    assert found.summary() == "image sizes were read from the image files: 2"


@pytest.mark.parametrize("kind", [str, float])
def test_sizes_of_another_type(coco, read, kind):
    for image in coco.content["images"]:
        image.update(width=kind(image["width"]), height=kind(image["height"]))
    found = read()
    assert [(i.width, i.height) for i in found.images] == [(60, 40), (30, 50), (20, 20)]
    assert all(type(i.width) is int for i in found.images) and found.summary() == ""


@pytest.mark.parametrize("size", [(61, 40), (40, 60), (120, 80), (60.5, 40)])
def test_size_contradicts(coco, refusal, size):
    coco.content["images"][0].update(width=size[0], height=size[1])
    given = " x ".join(f"{side:g}" for side in size)
    message = refusal()
    assert "1 of 3 images has another size than the annotation file says" in message
    assert f"a.png is given as {given} and has 60 x 40 pixels" in message


@pytest.mark.parametrize(
    "save",
    [
        dict(format="PNG"),
        dict(format="JPEG"),
        dict(format="JPEG", progressive=True),
        dict(format="TIFF"),
        dict(format="BMP"),
        dict(format="GIF"),
        dict(format="WEBP"),
        dict(format="JPEG2000"),
        dict(format="PPM"),
        dict(format="TGA"),
        dict(format="AVIF"),
    ],
    ids=str,
)
def test_headers_of_many_formats(tmp_path, save):
    """Whatever the suffix says."""
    path = tmp_path / "a.jpg"
    Image.new("RGB", (37, 21), "red").save(path, **save)
    assert read_header(str(path)) == ImageHeader(37, 21, 1)
    assert read_image(path).shape == (21, 37, 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I;16", "I", "F", "CMYK", "YCbCr"])
def test_headers_of_many_modes(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.tif")
    Image.new(mode, (37, 21)).save(path)
    assert read_header(str(path)) == ImageHeader(37, 21, 1)
    assert read_image(path).shape == (21, 37, 3)


def png_with_chunk_behind(path, kind: bytes, data: bytes) -> None:
    """A PNG of 37 x 21 pixels with a chunk between its pixels and its end."""
    Image.new("RGB", (37, 21)).save(path)
    content = path.read_bytes()
    chunk = struct.pack(">I", len(data)) + kind + data
    chunk += struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content[:-12] + chunk + content[-12:])


def test_png_is_not_decoded(tmp_path, monkeypatch):
    plain, dated = tmp_path / "a.png", tmp_path / "b.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (210, 370), np.uint8)).save(plain)
    png_with_chunk_behind(dated, b"tIME", struct.pack(">HBBBBB", 2024, 1, 1, 0, 0, 0))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    assert read_header(str(plain)) == ImageHeader(370, 210, 1)
    assert read_header(str(dated)) == ImageHeader(37, 21, 1)


def test_png_with_exif_behind_the_pixels(tmp_path):
    path = tmp_path / "a.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    png_with_chunk_behind(path, b"eXIf", exif.tobytes()[6:])
    assert read_header(str(path)) == ImageHeader(37, 21, 6)
    assert read_image(path).shape == (37, 21, 3)


def broken_files() -> dict[str, bytes]:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header
    return {
        "empty": b"",
        "one byte": b"\xff",
        "page of a web server": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "vector graphics": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "pointer of git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n%%EOF\n",
        "HDF5": b"\x89HDF\r\n\x1a\n" + b"\0" * 99,
        "start of a JPEG": b"\xff\xd8\xff\xe0\x00\x10JFIF",
        "start of a PNG": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR",
        "start of a GIF": b"GIF89a",
        "start of a WebP": b"RIFF\x10\x00\x00\x00WEBPVP8 ",
        "start of a TIFF": b"II*\x00\x08\x00\x00\x00\xff\xff",
        "start of a BMP": b"BM" + b"\0" * 20,
        "PNG that claims to have 3.6 billion pixels": b"\x89PNG\r\n\x1a\n"
        + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + b"\0\0\0\0IDAT5\xaf\x06\x1e",
    }  # fmt: skip


@pytest.mark.parametrize("content", broken_files().values(), ids=list(broken_files()))
def test_header_of_a_broken_file(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    header = read_header(str(path))
    assert header[:3] == (0, 0, 1) and header.error and "\n" not in header.error
    assert str(tmp_path) not in header.error
    with pytest.raises(UserError):
        read_image(path)


def test_header_of_a_folder_and_of_nothing(tmp_path):
    assert read_header(str(tmp_path)).error and read_header(str(tmp_path / "no.jpg")).error


def test_truncated_files(tmp_path):
    """What is cut short behind the header is found when the image is read, with its name."""
    pixels = np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8)
    for name in ("a.jpg", "a.png", "a.bmp", "a.tif"):
        path = tmp_path / name
        Image.fromarray(pixels).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        if not read_header(str(path)).error:
            with pytest.raises(UserError, match=name):
                read_image(path)


class TestRemembered:
    """Headers of large data sets are read once."""

    @pytest.fixture(autouse=True)
    def small_is_large(self, tmp_path, monkeypatch):
        monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(image_files, "REMEMBERED_FROM", 2)
        monkeypatch.setattr(image_files, "_CHUNK", 2)

    @pytest.fixture
    def paths(self, tmp_path) -> list[str]:
        paths = [str(tmp_path / f"{i}.png") for i in range(5)]
        for i, path in enumerate(paths):
            Image.new("L", (10 + i, 5)).save(path)
        return paths

    @pytest.fixture
    def opened(self, monkeypatch) -> list[str]:
        opened = []
        read = image_files.read_header

        def read_and_note(path: str) -> ImageHeader:
            opened.append(path)
            return read(path)

        monkeypatch.setattr(image_files, "read_header", read_and_note)
        return opened

    expected = [ImageHeader(10 + i, 5, 1) for i in range(5)]

    def test_unchanged_files_are_not_opened_again(self, paths, opened):
        assert read_headers(paths, "") == self.expected
        assert sorted(opened) == paths
        assert read_headers(paths, "") == self.expected
        assert read_headers(paths[::-1] + paths, "") == self.expected[::-1] + self.expected
        assert len(opened) == 5

    def test_changed_files_are_read_again(self, paths, opened):
        read_headers(paths, "")
        Image.new("L", (77, 7)).save(paths[1])
        os.utime(paths[2], ns=(0, 5))
        assert read_headers(paths, "")[1] == ImageHeader(77, 7, 1)
        assert opened[5:] == paths[1:3]

    def test_unreadable_files_are_asked_again(self, paths, opened):
        os.truncate(paths[0], 0)
        assert read_headers(paths, "")[0].error and read_headers(paths, "")[0].error
        assert opened[5:] == paths[:1]

    def test_small_data_sets_leave_no_file(self, paths, tmp_path):
        read_headers(paths[:1], "")
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize("content", [b"no database at all" * 100, b"SQLite format 3\0", b""])
    def test_damaged_file_costs_only_time(self, paths, tmp_path, content):
        file = tmp_path / "cache" / "ddetr_d2" / "image_headers.sqlite"
        file.parent.mkdir(parents=True)
        file.write_bytes(content)
        for _ in range(2):
            assert read_headers(paths, "") == self.expected
        with sqlite3.connect(tmp_path / "other.sqlite") as other:
            other.execute("CREATE TABLE headers (path TEXT)")
        os.replace(tmp_path / "other.sqlite", file)
        assert read_headers(paths, "") == self.expected

    def test_file_damaged_in_the_middle_costs_only_time(self, paths, tmp_path):
        read_headers(paths, "")
        file = tmp_path / "cache" / "ddetr_d2" / "image_headers.sqlite"
        content = bytearray(file.read_bytes())
        content[100:] = os.urandom(len(content) - 100)
        file.write_bytes(content)
        assert read_headers(paths, "") == self.expected

    def test_folder_that_cannot_be_written_costs_only_time(self, paths, tmp_path, monkeypatch):
        (tmp_path / "cache").write_text("a file in the place of the folder")
        assert read_headers(paths, "") == self.expected
        (tmp_path / "cache").unlink()
        (tmp_path / "cache" / "ddetr_d2" / "image_headers.sqlite").mkdir(parents=True)
        assert read_headers(paths, "") == self.expected

    def test_locked_file_costs_only_time(self, paths, tmp_path, monkeypatch):
        read_headers(paths[:2], "")
        file = tmp_path / "cache" / "ddetr_d2" / "image_headers.sqlite"
        connect = sqlite3.connect
        monkeypatch.setattr(sqlite3, "connect", lambda path: connect(path, timeout=0.1))
        with connect(file) as other:
            other.execute("BEGIN EXCLUSIVE")
            assert read_headers(paths, "") == self.expected

    def test_names_that_are_no_text(self, tmp_path):
        paths = [os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9%d.png" % i) for i in range(3)]
        for path in paths:
            Image.new("L", (10, 5)).save(path)
        assert read_headers(paths, "") == [ImageHeader(10, 5, 1)] * 3
