"""Boxes lie where the objects are in the image that the model sees, whatever EXIF says."""

from ddetr_d2.data.coco.image_files import ImageHeader, read_header
from ddetr_d2.data.coco.orientation import annotated_as_stored
from ddetr_d2.data.images import read_image

import numpy as np
import pytest
from PIL import Image, ImageOps

ORIENTATION = 0x0112
BOX = [6, 3, 11, 5]  # in the pixels as stored


def save(path, orientation: int, size: tuple[int, int], **options) -> None:
    """A black image with BOX filled white, as stored, and an orientation."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    x, y, width, height = BOX
    pixels[y : y + height, x : x + width] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **options)


def white_box(pixels: np.ndarray) -> list[int]:
    """x, y, width, height of what is white in an image (H, W, 3)."""
    rows, columns = np.nonzero(pixels[..., 0] > 127)
    x, y = int(columns.min()), int(rows.min())
    return [x, y, int(columns.max()) + 1 - x, int(rows.max()) + 1 - y]


@pytest.fixture
def photographs(coco, read):
    """Read photographs of the given orientations and sizes; annotated as stored or upright."""

    def make(*photos: tuple[int, tuple[int, int], str], suffix="png", **options):
        coco.content["images"] = []
        coco.content["annotations"] = []
        for id, (orientation, size, annotated) in enumerate(photos, start=1):
            path = coco.images / f"{id}.{suffix}"
            save(path, orientation, size, **options)
            upright = read_image(path)
            box = BOX if annotated == "stored" else white_box(upright)
            width, height = size if annotated == "stored" else upright.shape[1::-1]
            coco.content["images"].append(
                {"id": id, "file_name": path.name, "width": width, "height": height}
            )
            coco.content["annotations"].append(
                {"id": id, "image_id": id, "category_id": 1, "bbox": box, "area": 7, "iscrowd": 0}
            )
        return read()

    return make


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("annotated", ["stored", "upright"])
@pytest.mark.parametrize(
    ("suffix", "options"), [("png", {}), ("tif", {}), ("jpg", {"quality": 95})]
)
def test_every_orientation(photographs, orientation, annotated, suffix, options):
    # A photograph on its side says of the set as a whole how it was annotated.
    photos = [(orientation, (40, 24), annotated), (6, (50, 20), annotated)]
    found = photographs(*photos, suffix=suffix, **options)
    for image, box in zip(found.images, found.boxes, strict=True):
        pixels = read_image(image.path)
        assert pixels.shape[:2] == (image.height, image.width)
        assert box.tolist() == white_box(pixels)
    turned = annotated == "stored" and 1 + (orientation != 1)
    assert found.summary() == (
        f"images were annotated without their EXIF orientation: boxes turned: {turned}"
        if turned
        else ""
    )
    assert found.areas.tolist() == [7, 7]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_expected_turn_is_pillows(tmp_path, orientation):
    """read_image, by which the tests above go, turns as Pillow's function does."""
    save(tmp_path / "a.png", orientation, (40, 24))
    with Image.open(tmp_path / "a.png") as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), upright)


@pytest.mark.parametrize(
    ("orientation", "size"),
    [(2, (40, 24)), (3, (40, 24)), (4, (40, 24)), (3, (30, 30)), (6, (30, 30))],
)
def test_without_another_image_that_tells(photographs, orientation, size):
    """Where the sizes cannot say, boxes stay: images are shown upright nearly everywhere."""
    found = photographs((orientation, size, "stored"), (1, size, "stored"))
    assert found.boxes[0].tolist() == BOX
    assert found.summary() == "images turned by EXIF data were taken as annotated upright: 1"


def test_images_of_both_kinds(photographs):
    """Each by its size; the one that does not tell is taken to be upright."""
    found = photographs((6, (40, 24), "stored"), (8, (40, 24), "upright"), (3, (40, 24), "upright"))
    for image, box in zip(found.images, found.boxes, strict=True):
        assert box.tolist() == white_box(read_image(image.path))


def test_annotated_as_stored():
    on_side, upside_down, square = (
        ImageHeader(40, 24, 6),
        ImageHeader(40, 24, 3),
        ImageHeader(30, 30, 5),
    )
    plain = ImageHeader(40, 24, 1)
    headers = [on_side, upside_down, square, plain]
    sizes = [(40, 24), (40, 24), (30, 30), (40, 24)]
    assert annotated_as_stored(headers, sizes) == [True, True, True, False]
    assert annotated_as_stored(headers[1:], sizes[1:]) == [False, False, False]
    assert annotated_as_stored([on_side, *headers], [(24, 40), *sizes]) == [
        False, True, False, False, False,
    ]  # fmt: skip
    assert annotated_as_stored(headers, [None, *sizes[1:]]) == [False] * 4


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_are_none(tmp_path, orientation):
    save(tmp_path / "a.jpg", orientation, (40, 24))
    assert read_header(str(tmp_path / "a.jpg")) == ImageHeader(40, 24, 1)
    assert read_image(tmp_path / "a.jpg").shape == (24, 40, 3)


def test_sizes_absent(coco, photographs, read):
    """Then boxes are those of the upright image."""
    photographs((6, (40, 24), "upright"))
    for key in ("width", "height"):
        del coco.content["images"][0][key]
    found = read()
    assert (found.images[0].width, found.images[0].height) == (24, 40)
    assert found.boxes[0].tolist() == white_box(read_image(found.images[0].path))


def test_size_of_neither(coco, photographs, refusal):
    photographs((6, (40, 24), "stored"))
    coco.content["images"][0].update(width=41)
    assert "1.png is given as 41 x 24 and has 24 x 40 pixels" in refusal()
