"""Odd image files, and combinations of a training and a test set."""

import struct
import zlib

import numpy as np
from odd_input import BOXES, Data, kind
from PIL import Image, ImageDraw

ORIENTATION = 0x0112


def replace(data: Data, mode: str = "RGB", size=(64, 48), **options) -> None:
    """Write the first image anew, under its name."""
    data.save("a.jpg", size, mode, **options)


@kind()
def png_called_jpg(data):
    replace(data, format="PNG")


@kind()
def webp_called_jpg(data):
    replace(data, format="WEBP")


@kind()
def tiff_called_jpg(data):
    replace(data, format="TIFF")


@kind()
def gif_called_jpg(data):
    replace(data, "P", format="GIF")


@kind()
def progressive_jpeg(data):
    replace(data, progressive=True)


@kind()
def cmyk_jpeg(data):
    replace(data, "CMYK")


@kind()
def grey_jpeg(data):
    replace(data, "L")


@kind()
def black_and_white(data):
    replace(data, "1", format="PNG")


@kind()
def grey_with_transparency(data):
    replace(data, "LA", format="PNG")


@kind()
def transparency(data):
    replace(data, "RGBA", format="PNG")


@kind()
def palette_with_transparency(data):
    replace(data, "P", format="PNG", transparency=0)


@kind()
def bmp(data):
    replace(data, format="BMP")


@kind()
def grey_of_16_bits(data):
    """Microscopes, depth cameras."""
    pixels = np.random.default_rng(0).integers(0, 4096, (48, 64), dtype=np.uint16)
    Image.fromarray(pixels).save(data.images / "a.jpg", format="PNG")


@kind()
def floats_in_tiff(data):
    pixels = np.random.default_rng(0).random((48, 64), dtype=np.float32)
    pixels[0, 0] = np.nan
    Image.fromarray(pixels).save(data.images / "a.jpg", format="TIFF")


@kind()
def animation(data):
    frames = [Image.new("P", (64, 48), color) for color in range(3)]
    frames[0].save(data.images / "a.jpg", format="GIF", save_all=True, append_images=frames[1:])


@kind()
def tiff_of_several_pages(data):
    pages = [Image.new("L", (64, 48)), Image.new("L", (10, 10))]
    pages[0].save(data.images / "a.jpg", format="TIFF", save_all=True, append_images=pages[1:])


@kind()
def file_behind_whose_end_something_stands(data):
    """Photographs with a film in the same file."""
    path = data.images / "a.jpg"
    path.write_bytes(path.read_bytes() + b"\0" * 1000)


@kind(boxes={**BOXES, "dot.png": [("cat", [0, 0, 1, 1])]})
def one_pixel(data):
    data.save("dot.png", (1, 1))
    data.content["images"].append({"id": 3, "file_name": "dot.png", "width": 1, "height": 1})
    data.add(3, 1, [0, 0, 1, 1])


@kind(
    boxes={**BOXES, "wide.png": [("cat", [4000, 0, 99, 1])], "high.png": [("dog", [0, 10, 1, 9])]}
)
def as_narrow_as_can_be(data):
    """Line cameras, scans of receipts."""
    for id, (name, size) in enumerate((("wide.png", (5000, 1)), ("high.png", (1, 5000))), 3):
        data.save(name, size)
        row = {"id": id, "file_name": name, "width": size[0], "height": size[1]}
        data.content["images"].append(row)
    data.add(3, 1, [4000, 0, 99, 1])
    data.add(4, 2, [0, 10, 1, 9])


def turned(data: Data, orientation: int, stored_box: list[float], format: str = "JPEG") -> None:
    """A photograph 3, t.jpg, stored as 60 x 40 pixels with a white cat, and an orientation."""
    image = Image.new("RGB", (60, 40))
    x, y, w, h = stored_box
    ImageDraw.Draw(image).rectangle((x, y, x + w - 1, y + h - 1), "white")
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image.save(data.images / "t.jpg", format, exif=exif)


@kind(boxes={**BOXES, "t.jpg": [("cat", [23, 6, 12, 20])]})
def photograph_on_its_side_annotated_upright(data):
    """Tools that show images as browsers do: CVAT, Label Studio."""
    turned(data, 6, [6, 5, 20, 12])
    data.content["images"].append({"id": 3, "file_name": "t.jpg", "width": 40, "height": 60})
    data.add(3, 1, [23, 6, 12, 20])


@kind(boxes={**BOXES, "t.jpg": [("cat", [23, 6, 12, 20])]}, said="EXIF orientation: boxes turned")
def photograph_on_its_side_annotated_as_stored(data):
    """Tools that read images with OpenCV or Pillow alone."""
    turned(data, 6, [6, 5, 20, 12])
    data.content["images"].append({"id": 3, "file_name": "t.jpg", "width": 60, "height": 40})
    data.add(3, 1, [6, 5, 20, 12])


@kind(boxes={**BOXES, "t.jpg": [("cat", [5, 34, 12, 20])]}, said="EXIF orientation: boxes turned")
def tiff_on_its_side_annotated_as_stored(data):
    turned(data, 8, [6, 5, 20, 12], "TIFF")
    data.content["images"].append({"id": 3, "file_name": "t.jpg", "width": 60, "height": 40})
    data.add(3, 1, [6, 5, 20, 12])


@kind(
    boxes={**BOXES, "t.jpg": [("cat", [34, 23, 20, 12])]},
    said="images turned by EXIF data were taken as annotated upright: 1",
)
def photograph_upside_down(data):
    """Nothing tells how it was annotated: upright, as nearly everywhere."""
    turned(data, 3, [6, 5, 20, 12], "PNG")
    data.content["images"].append({"id": 3, "file_name": "t.jpg", "width": 60, "height": 40})
    data.add(3, 1, [34, 23, 20, 12])


@kind(refused="1 of 2 image files cannot be read: a.jpg")
def empty_image(data):
    (data.images / "a.jpg").write_bytes(b"")


@kind(refused=r"1 of 2 image files cannot be read: a.jpg \(no image, or of an unknown kind\)")
def page_of_a_web_server_called_jpg(data):
    (data.images / "a.jpg").write_text("<html><body>403 Forbidden</body></html>")


@kind(refused="1 of 2 image files cannot be read: a.jpg")
def vector_graphics(data):
    (data.images / "a.jpg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')


@kind(refused="1 of 2 image files cannot be read: a.jpg")
def drawing_for_a_printer(data):
    """EPS: Pillow tells its size and cannot draw it."""
    eps = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 48\n%%EndComments\n%%EOF\n"
    (data.images / "a.jpg").write_text(eps)


@kind(refused="1 of 2 image files cannot be read: a.jpg")
def header_cut_short(data):
    path = data.images / "a.jpg"
    path.write_bytes(path.read_bytes()[:20])


@kind(refused="a.jpg is cut short or damaged")
def jpeg_cut_short(data):
    path = data.images / "a.jpg"
    path.write_bytes(path.read_bytes()[:-400])


@kind(refused="b.png is cut short or damaged")
def png_cut_short(data):
    path = data.images / "b.png"
    path.write_bytes(path.read_bytes()[:-400])


@kind(refused="1 of 2 image files cannot be read: b.png .*too large")
def claims_billions_of_pixels(data):
    """A decompression bomb."""
    path = data.images / "b.png"
    content = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + content[24:29]
    check = struct.pack(">I", zlib.crc32(header))
    path.write_bytes(content[:12] + header + check + content[33:])


@kind(refused="1 of 2 image files cannot be read: a.jpg")
def folder_called_jpg(data):
    (data.images / "a.jpg").unlink()
    (data.images / "a.jpg").mkdir()


# --- training and test set ----------------------------------------------------------------------


def test_set(data: Data) -> Data:
    data.test = Data(data.root / "test")
    return data.test


test_set.__test__ = False  # no test of pytest's


@kind()
def test_set_with_other_ids(data):
    for row in (test := test_set(data)).each("categories", "annotations"):
        row["id" if "name" in row else "category_id"] += 70
    assert test.content["categories"][0]["id"] == 71


@kind()
def test_set_with_another_order_of_classes(data):
    """Numbered by the order in which a tool met them."""
    for row in test_set(data).each("categories", "annotations"):
        key = "id" if "name" in row else "category_id"
        row[key] = 3 - row[key]


@kind(said="class names taken as the same: cat / CAT")
def test_set_with_another_spelling(data):
    test_set(data).content["categories"][0]["name"] = "CAT"


DOGS = {file: [o for o in objects if o[0] == "dog"] for file, objects in BOXES.items()}


@kind(test_boxes=DOGS, said="lacks 1 of the model's 2 classes, which does not count in its AP: cat")
def test_set_lacks_a_class(data):
    test = test_set(data)
    del test.content["annotations"][0], test.content["categories"][0]


@kind(said="has 1 classes that the model does not have; they are left out of the AP: cow")
def test_set_has_another_class(data):
    test = test_set(data)
    test.content["categories"].append({"id": 3, "name": "cow"})
    test.add(1, 3, [1, 1, 9, 9])


@kind(refused="have no class in common: the set has lion, tiger, the model cat, dog")
def test_set_of_other_classes(data):
    for row, name in zip(test_set(data).content["categories"], ("lion", "tiger"), strict=True):
        row["name"] = name


@kind(refused="NUM_CLASSES is 80, but there are 2 classes")
def other_number_of_classes_in_the_configuration(data):
    """Taken over from COCO's."""
    data.options += ["MODEL.DEFORMABLE_DETR.NUM_CLASSES", "80"]


@kind(test_boxes=BOXES)
def test_set_without_annotations(data):
    """COCO's test-dev: there are detections, and no AP."""
    del test_set(data).content["annotations"]
