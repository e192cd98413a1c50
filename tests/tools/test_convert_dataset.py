"""tools/convert_dataset.py: the COCO files it makes of small folders written here."""

import importlib
import json
import re
import shlex
import subprocess
import sys

from ddetr_d2.errors import UserError

import pytest
from PIL import Image

from ..conftest import ROOT, TINY
from ..programs import run_program

pytest.importorskip("supervision")
TOOL = ROOT / "tools" / "convert_dataset.py"
SIZE = (100, 50)  # width and height of the images here


def write(folder, files):
    """Write files: images where the content is None or a size, texts elsewhere."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            Image.new("RGB", content or SIZE).save(path)


def voc(*objects, size=SIZE, more=""):
    """An XML file of objects given as (name, xmin, ymin, xmax, ymax, further elements)."""
    tags = ("xmin", "ymin", "xmax", "ymax")
    text = "".join(
        f"<object><name>{name}</name>{''.join(rest[4:])}<bndbox>"
        + "".join(f"<{tag}>{value}</{tag}>" for tag, value in zip(tags, rest[:4], strict=True))
        + "</bndbox></object>"
        for name, *rest in objects
    )
    size = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>"
    return f"<annotation>{size}{text}{more}</annotation>"


@pytest.fixture
def data(tmp_path):
    return tmp_path / "my data"


@pytest.fixture
def convert(data, monkeypatch, capsys):
    """Convert ``data`` here; returns the annotation files by name and what was printed."""
    monkeypatch.syspath_prepend(ROOT / "tools")

    def convert(*options, source=data):
        output = data.parent / "coco"
        module = importlib.import_module("convert_dataset")
        module.main([str(source), "--output", str(output), *options])
        files = {path.stem: json.loads(path.read_text()) for path in output.iterdir()}
        return files, capsys.readouterr().out

    return convert


def boxes(coco):
    """(file name, class name, box) of every annotation, and (file name,) of images without one."""
    names = {category["id"]: category["name"] for category in coco["categories"]}
    rows = []
    for image in coco["images"]:
        found = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        rows += [(image["file_name"], names[a["category_id"]], *a["bbox"]) for a in found]
        rows += [(image["file_name"],)] * (not found)
    return rows


ULTRALYTICS = {
    "data.yaml": "path: ../datasets/mine\ntrain: images/train\nval: images/val\ntest:\n"
    "names:\n  1: cat\n  0: zebra\n  2: no\n",
    "images/train/a.jpg": None,
    "images/train/b.png": None,
    "images/train/c.JPG": None,
    "images/train/deep/d.gif": None,
    "images/val/a.jpg": None,
    # a box with a confidence, a polygon, an oriented box, a class as numpy writes it
    "labels/train/a.txt": "2 0.5 0.5 0.2 0.4 0.9\n\n1 0.1 0.2 0.3 0.2 0.25 0.6\n"
    "0 0.1 0.5 0.2 0.3 0.3 0.5 0.2 0.7\n1.0e+00 0.123456 0.654321 0.111112 0.222222\r\n",
    "labels/train/b.txt": "",
    "labels/train/deep/d.txt": "0 0.25 0.5 0.5 1\n",
    "labels/train/lost.txt": "0 0.5 0.5 1 1\n",
    "labels/val/a.txt": "0 0.5 0.5 1 1",
}


def test_yolo_by_the_command_of_the_readme_and_training_by_the_printed_one(data, train_net):
    write(data, ULTRALYTICS)
    output = data.parent / "coco"
    command = [sys.executable, str(TOOL), "--from", "yolo", str(data), "--output", str(output)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "100%" in run.stderr
    assert "train: 4 images (2 without objects), 5 boxes\n" in run.stdout
    assert (
        "1 label file is not used, as no image of these sets has its name" in run.stdout
        and "lost.txt" in run.stdout
    )
    assert sorted(path.name for path in output.iterdir()) == ["train.json", "val.json"]

    train = json.loads((output / "train.json").read_text())
    categories = [{"id": 1, "name": "zebra"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "no"}]
    assert train["categories"] == categories
    size = {"width": 100, "height": 50}
    assert train["images"][0] == {"id": 1, "file_name": "a.jpg", **size}
    annotation = {"id": 1, "image_id": 1, "category_id": 3, "bbox": [40, 15, 20, 20]}
    assert train["annotations"][0] == {**annotation, "area": 400, "iscrowd": 0}
    assert boxes(train) == [
        ("a.jpg", "no", 40, 15, 20, 20),
        ("a.jpg", "cat", 10, 10, 20, 20),
        ("a.jpg", "zebra", 10, 15, 20, 20),
        ("a.jpg", "cat", 6.79, 27.1605, 11.1112, 11.1111),
        ("b.png",),
        ("c.JPG",),
        ("deep/d.gif", "zebra", 0, 0, 50, 50),
    ]
    val = json.loads((output / "val.json").read_text())
    assert val["categories"] == categories
    assert boxes(val) == [("a.jpg", "zebra", 0, 0, 100, 50)]

    inspection, training = run.stdout.partition("train with\n\n")[2].split("\n\n")
    words = shlex.split(inspection)
    assert words[1].endswith("tools/inspect_dataset.py")
    done = run_program(ROOT / words[1], *words[2:])
    assert done.returncode == 0, done.stderr
    words = shlex.split(training.replace("\\\n", " "))
    assert words[0] == "python" and words[1].endswith("train_net.py")
    run = train_net(
        *words[2:], *TINY, "SOLVER.MAX_ITER", "1", "OUTPUT_DIR", str(data.parent / "run")
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "; 3 classes." in run.stdout
    assert re.search(r"copypaste: [\d.]+,", run.stdout)


def test_roboflow_layout(data, convert):
    yaml = "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\n"
    write(
        data,
        {
            "data.yaml": yaml + "names: ['yes', no]\n",
            "train/images/x_jpg.rf.1a.jpg": None,
            "train/labels/x_jpg.rf.1a.txt": "1 0.5 0.5 0.5 0.5\n",
            "valid/images/y.jpg": None,
            "valid/labels/y.txt": "0 0.5 0.5 0.5 0.5\n",
        },
    )
    # another data set's folder, which ../train/images would be if taken literally
    write(data.parent, {"train/images/other.jpg": None, "train/labels/other.txt": "0 1 1 1 1"})
    files, printed = convert()
    assert boxes(files["train"]) == [("x_jpg.rf.1a.jpg", "no", 25, 12.5, 50, 25)]
    assert boxes(files["val"]) == [("y.jpg", "yes", 25, 12.5, 50, 25)]
    assert "test is ../test/images, which is not in" in printed
    assert set(files) == {"train", "val"}


def test_yaml_with_absolute_paths_lists_and_keypoints(data, convert):
    pose = "0 0.5 0.5 0.2 0.4 0.9 0.9 0.1 0.1\n"
    write(
        data,
        {
            "coco-pose.yaml": "train: [/elsewhere/mine/images/a, train.txt]\nval: images/a\n"
            "names: [person]\nkpt_shape: [2, 2]\n",
            "train.txt": "./images/b/2.jpg\n",
            **{f"images/{name}.jpg": None for name in ("a/1", "b/2", "b/not_listed")},
            **{f"labels/{name}.txt": pose for name in ("a/1", "b/2", "b/not_listed")},
        },
    )
    files, _ = convert(source=data / "coco-pose.yaml")
    expected = ("person", 40, 15, 20, 20)
    assert boxes(files["train"]) == [("a/1.jpg", *expected), ("b/2.jpg", *expected)]
    assert boxes(files["val"]) == [("1.jpg", *expected)]


def test_labels_beside_the_images_with_classes_txt(data, convert):
    images = {f"{number}.jpg": None for number in range(10)}
    labels = {f"{number}.txt": f"{number % 2} 0.5 0.5 1 1\n" for number in range(9)}
    others = {"classes.txt": "\ufeffzebra\ncat\n\n", "._0.jpg": "of a Mac"}
    write(data, {**others, **images, **labels})
    files, printed = convert()
    whole = boxes(files["train"])
    assert [row[1] for row in whole[:-1]] == ["zebra", "cat"] * 4 + ["zebra"]
    assert whole[-1] == ("9.jpg",)
    assert "not used" not in printed
    assert "DATASETS.TEST '()'" in printed and "--hold-out" in printed

    files, printed = convert("--hold-out", "0.3", "--overwrite")
    assert len(files["train"]["images"]) == 7 and len(files["val"]["images"]) == 3
    assert sorted(boxes(files["train"]) + boxes(files["val"])) == whole
    assert """DATASETS.TEST '("coco_val",)'""" in printed


def test_yolo_coordinates_are_of_the_upright_image(data, convert):
    write(data, {"classes.txt": "cat", "images/a.jpg": None, "labels/a.txt": "0 .25 .5 .5 1"})
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (100, 50)).save(data / "images" / "a.jpg", exif=exif)
    train = convert()[0]["train"]
    assert (train["images"][0]["width"], train["images"][0]["height"]) == (50, 100)
    assert boxes(train) == [("a.jpg", "cat", 0, 0, 25, 100)]


def test_voc_with_image_sets(data, convert):
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    write(
        data,
        {
            "JPEGImages/1.jpg": None,
            "JPEGImages/2.jpg": None,
            "JPEGImages/3 x.jpg": None,
            "JPEGImages/not_listed.jpg": None,
            "SegmentationClass/1.png": None,
            "ImageSets/Main/train.txt": "1\n2\n",
            "ImageSets/Main/val.txt": "3 x\n",
            "ImageSets/Main/trainval.txt": "1\n2\n3 x\n",
            "ImageSets/Main/zebra_train.txt": "1  1\n2 -1\n",
            "Annotations/1.xml": voc(
                ("zebra", 1, 1, 100, 50, "<difficult>0</difficult>", part),
                ("cat ", 11, 21, 30.5, 40, "<difficult>1</difficult>"),
            ),
            "Annotations/2.xml": voc(),
            "Annotations/3 x.xml": voc(("bird", 100, 50, 100, 50), size=(0, 0)),
            "Annotations/not_listed.xml": voc(("dog", 1, 1, 2, 2)),
        },
    )
    files, printed = convert()
    assert set(files) == {"train", "val", "trainval"}
    assert [category["name"] for category in files["train"]["categories"]] == [
        *("bird", "cat", "zebra")
    ]
    assert files["val"]["categories"] == files["train"]["categories"]
    # The first pixel is 1 and the last one is within the box.
    assert boxes(files["train"]) == [
        ("1.jpg", "zebra", 0, 0, 100, 50),
        ("1.jpg", "cat", 10, 20, 20.5, 20),
        ("2.jpg",),
    ]
    assert [a["iscrowd"] for a in files["train"]["annotations"]] == [0, 1]
    assert "1 difficult objects of train become iscrowd" in printed
    assert boxes(files["val"]) == [("3 x.jpg", "bird", 99, 49, 1, 1)]
    assert boxes(files["trainval"]) == boxes(files["train"]) + boxes(files["val"])
    assert """TRAIN '("coco_train",)'""" in printed and """TEST '("coco_val",)'""" in printed

    one_less = convert("--first-pixel", "0", "--overwrite")[0]
    assert boxes(one_less["train"])[0] == ("1.jpg", "zebra", 1, 1, 99, 49)


def test_voc_beside_the_images_with_a_first_pixel_of_0(data, convert):
    polygon = "<polygon><x1>1</x1><y1>2</y1><x2>3</x2></polygon>"
    write(
        data,
        {
            "train/a.jpg": None,
            "train/a.xml": voc(("cat", 0, 10, 100, 50, polygon), ("cat", 20, 20, 10, 10)),
            "train/b.jpg": None,
            "valid/c.jpg": None,
            "valid/c.xml": voc(("dog", 1, 1, 2, 2)),
        },
    )
    files, printed = convert()
    assert "count from 0" in printed
    assert boxes(files["train"]) == [
        ("a.jpg", "cat", 0, 10, 100, 40),
        ("a.jpg", "cat", 10, 10, 10, 10),  # corners the other way round
        ("b.jpg",),
    ]
    assert boxes(files["val"]) == [("c.jpg", "dog", 1, 1, 1, 1)]
    assert [category["name"] for category in files["val"]["categories"]] == ["cat", "dog"]


YOLO = {"classes.txt": "cat\ndog\n", "images/a.jpg": None, "images/b.jpg": None}
VOC = {"a.jpg": None}


@pytest.mark.parametrize(
    "files, message",
    [
        ({"a.jpg": None}, "is neither a YOLO folder .* nor a Pascal VOC folder"),
        ({**YOLO, "a.xml": voc()}, "give --from yolo or --from voc"),
        (YOLO, r"images: none of the 2 images has a label"),
        ({**YOLO, "labels/a.txt": "\n1 .5 .5 1 1\n2 .5 .5 1 1"}, "a.txt, line 3: class 2, but"),
        ({**YOLO, "labels/a.txt": "-1 .5 .5 1 1"}, "a.txt, line 1: class -1, but"),
        ({**YOLO, "labels/a.txt": "0 .5 .5 1 1\n0 .5 wide 1 1"}, "a.txt, line 2: .*'wide'"),
        ({**YOLO, "labels/a.txt": "cat .5 .5 1 1"}, "a.txt, line 1: .*'cat'"),
        ({**YOLO, "labels/a.txt": "0 .5 .5 1"}, "a.txt, line 1: .*at least 5"),
        (
            {**YOLO, "labels/a.txt": "0 .5 .5 1 1\n1 60 20 30 12.5"},
            "a.txt, line 2: '1 60 20 30 12.5' looks like pixels: .* numbers from 0 to 1",
        ),
        (
            {**YOLO, "labels/a.txt": b"0 .5 .5 1 1 # \xe9"},
            "a.txt is no text .* Latin-1, save the file as UTF-8",
        ),
        ({**YOLO, "labels/a.txt": "0 nan .5 .6 .7 .8 .9"}, "a.txt, line 1: .*finite"),
        ({**YOLO, "labels/a.txt": "", "labels/b.txt": ""}, "images: no label file has an object"),
        ({**YOLO, "images/a.png": None, "labels/a.txt": ""}, "belongs to both a.jpg and a.png"),
        ({**YOLO, "classes.txt": "cat\ncat"}, "names the class 'cat' 2 times"),
        (
            {**YOLO, "labels/a.txt": "", "images/b.jpg": "x"},
            "1 image cannot be read: remove it; .*b.jpg",
        ),
        ({"data.yaml": "names: [cat]\ntrain: away"}, "train is away, which is not in"),
        ({"data.yaml": "names: [cat]\nval: x"}, "names no folder of training images"),
        ({**YOLO, "val/a.jpg": None}, "has a folder called val, but no train"),
        ({**YOLO, "train/a.jpg": None, "Training/a.jpg": None}, "both look like the train set"),
        ({"data.yaml": "names: {0: cat, 2: dog}"}, "has the keys 0, 2; .* from 0 to 1"),
        ({"data.yaml": "names: [cat"}, "no valid YAML: .*line 1"),
        ({**VOC, "a.xml": "<annotation>\n<object></annotation>"}, "a.xml is no valid XML.*line 2"),
        ({**VOC, "a.xml": voc(("cat", 1, 1, "x", 5))}, r"a.xml, object 1 \(cat\): .*'x'"),
        ({**VOC, "a.xml": voc(("", 1, 1, 2, 5))}, r"a.xml, object 1 \(\): .*'name'"),
        (
            {**VOC, "a.xml": voc(more="<object><name>c</name></object>")},
            r"object 1 \(c\): .*bndbox",
        ),
        ({**VOC, "a.xml": voc(("cat", 1, 1, 2, 2), size=(40, 50))}, "40 x 50 pixels, .* 100 x 50"),
        (
            {"JPEGImages/a.jpg": None, "a.xml": voc(), "ImageSets/Main/train.txt": "a\nb"},
            "train.txt, line 2: .* has no image b",
        ),
    ],
)
def test_what_is_wrong_is_named_and_nothing_written(files, message, data, convert):
    write(data, files)
    with pytest.raises(UserError, match=message) as error:
        convert()
    assert "\n" not in str(error.value)
    assert [path.name for path in data.parent.iterdir()] == ["my data"]


def test_disk_full(data, convert, monkeypatch):
    write(data, ULTRALYTICS)
    convert("--overwrite")  # imports the program
    before = (data.parent / "coco" / "train.json").read_text()

    def full(content, file, **_):
        file.write("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(UserError, match="No space left"):
        convert("--overwrite")
    assert (data.parent / "coco" / "train.json").read_text() == before
    assert sorted(path.name for path in data.parent.iterdir()) == ["coco", "my data"]


def test_without_the_library():
    code = (
        "import runpy, sys; sys.modules['supervision'] = None; sys.path.insert(0, sys.argv[1]); "
        "runpy.run_module('convert_dataset', run_name='__main__')"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(TOOL.parent)], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert re.fullmatch(r"error: .*supervision.*pip install supervision\n", run.stderr)
