"""tools/inspect_dataset.py."""

import importlib.util
import json
import shutil
import subprocess
import sys

from ddetr_d2.errors import UserError

import numpy as np
import pytest
from PIL import Image

from ..conftest import ROOT
from ..programs import run_program

PROGRAM = ROOT / "tools" / "inspect_dataset.py"
SPEC = importlib.util.spec_from_file_location("inspect_dataset", PROGRAM)
inspect_dataset = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(inspect_dataset)


pytestmark = pytest.mark.usefixtures("clean_catalogs")


@pytest.fixture
def copied_shapes(shapes, tmp_path):
    """A synthetic set of 4 training and 2 validation images, to be changed."""
    return shutil.copytree(shapes, tmp_path / "shapes")


def test_files_with_pictures(copied_shapes, tmp_path, capsys):
    shutil.copy(copied_shapes / "train" / "000001.jpg", copied_shapes / "val" / "000000.jpg")
    content = json.loads((copied_shapes / "train.json").read_text())
    val = json.loads((copied_shapes / "val.json").read_text())
    val["images"][0] |= {key: content["images"][1][key] for key in ("width", "height")}
    (copied_shapes / "val.json").write_text(json.dumps(val))
    image = copied_shapes / "train" / "000000.jpg"
    image.write_bytes(image.read_bytes()[:1000])  # its header can be read

    output = tmp_path / "report"
    files = [str(copied_shapes / f"{split}.json") for split in ("train", "val")]
    inspect_dataset.main([files[0], "--test", files[1], "--output", str(output)])
    text = capsys.readouterr().out
    assert "1 image of val.json (test) is in train.json (training) as well" in text
    assert f"left out of train_samples.jpg: image file {image} is cut short" in text

    report = json.loads((output / "report.json").read_text())
    assert [part["images"] for part in report["data_sets"]] == [4, 2]
    assert [part["role"] for part in report["data_sets"]] == ["training", "test"]
    assert report["data_sets"][0]["objects"] == len(content["annotations"])
    for stem in ("train", "val"):
        for name in (f"{stem}_distributions.png", f"{stem}_samples.jpg"):
            with Image.open(output / name) as picture:
                picture.load()
                assert picture.width > 600


def test_boxes_are_drawn_where_they_are(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    image = Image.new("RGB", (400, 300), "white")
    image.paste("black", (100, 150, 300, 250))
    image.save(images / "a.png")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 400, "height": 300}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [100, 150, 200, 100]}],
        "categories": [{"id": 1, "name": "x"}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    inspect_dataset.main([str(tmp_path / "a.json"), "--output", str(tmp_path / "out")])
    with Image.open(tmp_path / "out" / "a_samples.jpg") as picture:
        pixels = np.asarray(picture).astype(int)[picture.height // 10 :]  # below the title
    object = pixels.max(axis=2) < 60
    lines = pixels[..., 2] - pixels[..., 0] > 40
    for axis in (0, 1):
        (low, high), (first, last) = (
            np.flatnonzero(found.sum(axis=axis) > 20)[[0, -1]] for found in (object, lines)
        )
        assert high - low > 0.25 * picture.size[axis]
        assert (first, last) == pytest.approx((low, high), abs=4)


def test_registered_names_and_the_sets_of_a_configuration(shapes_opts, capsys):
    config = ["--config-file", str(ROOT / "configs" / "deformable_detr.yaml")]
    inspect_dataset.main([*config, "--opts", *shapes_opts, "INPUT.MIN_SIZE_TEST", "123"])
    text = capsys.readouterr().out
    assert text.index("tiny_train (training)") < text.index("tiny_val (test)")
    assert "shortest side of 640 (configured: 480 to 800), at most 1333" in text
    assert "shortest side of 123" in text

    inspect_dataset.main(["--test", "tiny_val", "--opts", *shapes_opts])
    text = capsys.readouterr().out
    assert "tiny_val (test)" in text and "tiny_train" not in text


@pytest.mark.parametrize(
    ("json_file", "folder", "name"),
    [
        ("train.json", "train", "a.png"),
        ("train.json", "images/train", "a.png"),
        ("train.json", "images", "a.png"),
        ("_annotations.coco.json", ".", "a.png"),
        ("annotations/instances_train2017.json", "train2017", "a.png"),
        ("annotations/instances_default.json", "images", "a.png"),
        ("annotations/train.json", ".", "images/a.png"),
        ("result.json", "images", "..\\x\\a.png"),
    ],
)
def test_images_are_found_beside_the_file(tmp_path, json_file, folder, name):
    path = tmp_path / json_file
    path.parent.mkdir(exist_ok=True)
    content = {"images": [{"id": 1, "file_name": name}], "categories": []}
    path.write_text(json.dumps(content))
    image = tmp_path / folder / (name if "\\" not in name else "a.png")
    image.parent.mkdir(exist_ok=True, parents=True)
    image.touch()
    (tmp_path / "other").mkdir()
    found = inspect_dataset.find_image_folder(str(path))
    assert (tmp_path / folder).samefile(found)


def test_images_are_nowhere(tmp_path):
    (tmp_path / "images").mkdir()
    path = tmp_path / "train.json"
    path.write_text('{"images": [{"id": 1, "file_name": "a.png"}], "categories": []}')
    with pytest.raises(UserError, match=r"a.png is in none of .*images.*; give --images"):
        inspect_dataset.find_image_folder(str(path))


def test_image_folders_are_given_once_or_for_each_file(shapes, capsys):
    files = [str(shapes / f"{split}.json") for split in ("train", "val")]
    folders = ["--images", str(shapes / "train"), "--images", str(shapes / "val")]
    inspect_dataset.main([files[0], "--test", files[1], *folders])
    assert f"val.json, images in {shapes}/val" in capsys.readouterr().out
    with pytest.raises(UserError, match="--images is given 2 times for 1 annotation files"):
        inspect_dataset.main([files[0], *folders])


def test_short_names_are_as_short_as_they_can_be():
    names = inspect_dataset.short_names(["a/train.json", "b/train.json", "b/val.json"])
    assert list(names.values()) == ["a/train.json", "b/train.json", "val.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name annotation files or registered data sets, or give --config-file"),
        (["missing.json"], "missing.json does not exist"),
        (["coco_2017_trian"], "is no file or registered name; did you mean coco_2017_train?"),
        (["tests"], "tests is a folder: name an annotation file in it"),
        (["lvis_v1_train"], "'lvis_v1_train' is not in COCO format"),
        (["coco_2017_val", "--opts", "DATASETS.COCO_FORMAT", "[['a']]"], "['a']"),
    ],
)
def test_mistakes_are_named(arguments, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as caught:
        inspect_dataset.main(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_suspicious_sets_are_no_error_and_mistakes_are(copied_shapes, capsys):
    path = copied_shapes / "train.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["bbox"] = [0.2, 0.2, 0.5, 0.5]
    path.write_text(json.dumps(content))
    inspect_dataset.main([str(path)])
    assert "boxes lie within 0 to 1" in capsys.readouterr().out

    command = [sys.executable, str(PROGRAM), str(path), "--images", str(copied_shapes / "x")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "give --images FOLDER" in done.stderr


def test_class_names_without_a_font_are_said_once(copied_shapes, tmp_path):
    path = copied_shapes / "train.json"
    content = json.loads(path.read_text())
    for category in content["categories"]:
        category["name"] += "\N{EGYPTIAN HIEROGLYPH A001}"  # hardly anybody has a font with it
    path.write_text(json.dumps(content))
    done = run_program(PROGRAM, str(path), "--output", str(tmp_path / "report"))
    assert done.returncode == 0, done.stderr
    assert "Glyph" not in done.stderr
