"""demo/demo.py with a tiny detector of random weights."""

import os
import sys
import warnings
from pathlib import Path

from ddetr_d2 import Detector
from ddetr_d2.checkpoint import DetrCheckpointer
from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError, exit_on_user_error
from ddetr_d2.visualization import draw_detections

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "demo"))  # as Python does for the program

import files as files_of_the_demo  # noqa: E402
import window  # noqa: E402

import demo  # noqa: E402

NAMES = ["RBC", "WBC", "Platelets"]
CONFIG = f"""\
_BASE_: {ROOT}/configs/synthetic_demo.yaml
MODEL:
  DEVICE: cpu
  RESNETS:
    STEM_OUT_CHANNELS: 64
  DEFORMABLE_DETR:
    HIDDEN_DIM: 32
    NUM_HEADS: 2
    DIM_FEEDFORWARD: 32
    NUM_QUERIES: 10
    DEC_LAYERS: 1
DATASETS:
  TRAIN: ()
  TEST: ()
INPUT:
  MIN_SIZE_TEST: 64
  MAX_SIZE_TEST: 96
"""


@pytest.fixture(autouse=True)
def no_log(monkeypatch):
    """Detectron2's loggers would keep the stdout of the first test."""
    monkeypatch.setattr(demo, "setup_logger", lambda **_: None)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Folder with config.yaml, named.pth (with class names) and nameless.pth."""
    folder = tmp_path_factory.mktemp("demo")
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    cfg = setup_cfg(str(config), ["MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3"])
    model = build_model(cfg)
    DetrCheckpointer(model, str(folder), class_names=NAMES).save("named")
    DetrCheckpointer(model, str(folder)).save("nameless")
    return folder


@pytest.fixture(scope="module")
def arguments(files):
    def build(*args, weights="named.pth", opts=()):
        fixed = ["--config-file", str(files / "config.yaml"), "--confidence-threshold", "0"]
        changes = ["--opts", "MODEL.WEIGHTS", str(files / weights), *opts]
        return demo.get_parser().parse_args([*fixed, *map(str, args), *changes])

    return build


def write_image(path, size=(60, 40)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(path)
    return path


def test_folder_globs_and_files(arguments, tmp_path, capsys):
    write_image(tmp_path / "a" / "x.png")
    write_image(tmp_path / "a" / "y.jpg")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    write_image(tmp_path / "b" / "x.png")  # same name as one in a/
    write_image(tmp_path / "b" / "z[1].png", size=(1, 50))
    out = tmp_path / "out"
    inputs = [tmp_path / "a", tmp_path / "b" / "x*", tmp_path / "b" / "z[1].png"]

    assert demo.run(arguments("--input", *inputs, "--output", out)) == 0

    assert sorted(p.name for p in out.iterdir()) == ["x.png", "x_2.png", "y.jpg", "z[1].png"]
    drawing = cv2.imread(str(out / "x.png"))
    assert drawing.shape[0] / drawing.shape[1] == 40 / 60
    assert "x.png: 30 detections" in capsys.readouterr().out


def test_unreadable_inputs_are_named_and_skipped(arguments, tmp_path, capsys):
    good = write_image(tmp_path / "good.png")
    cut = write_image(tmp_path / "cut.jpg", size=(300, 300))
    cut.write_bytes(cut.read_bytes()[:200])
    text = tmp_path / "text.png"
    text.write_text("no image")
    out = tmp_path / "out.png"
    inputs = ["--input", good, cut, text, tmp_path / "missing.png"]

    assert demo.run(arguments(*inputs, "--output", tmp_path / "out")) == 1

    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.png"]
    err = capsys.readouterr().err
    for name in ("cut.jpg", "text.png", "missing.png"):
        assert f"{name}" in err
    assert "3 inputs were skipped" in err

    assert demo.run(arguments("--input", good, "--output", out)) == 0
    assert out.is_file()


def found(*patterns):
    """What is found, by the names of the files."""
    images, problems, left_out = files_of_the_demo.find_images([str(p) for p in patterns])
    return [Path(image).name for image in images], problems, left_out


def test_a_folders_images_of_every_format(tmp_path):
    names = ["a.jfif", "b.jpe", "c.GIF", "d.avif", "e.jp2", "f.tga", "g.ico", "h.pcx", "i.mpo"]
    for name in names:
        write_image(tmp_path / name)
    for name in ("without_suffix", "x.2024-01-01"):
        write_image(tmp_path / "x.png").rename(tmp_path / name)
    for name in (".hidden.jpg", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_text("")
    assert found(tmp_path) == ([*names, "without_suffix", "x.2024-01-01"], [], [])


def test_what_is_left_out_of_a_folder_is_named_in_one_line(tmp_path):
    write_image(tmp_path / "image.png")
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "a.png")
    for i in range(1000):
        (tmp_path / f"{i:03}.txt").write_text("no image")
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    images, problems, [message] = found(tmp_path)
    assert images == ["image.png"] and not problems
    assert "000.txt, 001.txt, 002.txt, 003.txt, 004.txt and 998 more" in message

    for path in tmp_path.glob("*.txt"):
        path.unlink()
    _, _, [message] = found(tmp_path)
    assert message.endswith("a.heic, a.png, folder.jpg/")

    (tmp_path / "image.png").unlink()
    images, [message], left_out = found(tmp_path)
    assert not images and not left_out
    assert message.endswith("the folder holds no image; it holds a.heic, a.png, folder.jpg/")


def test_a_folder_with_other_files(arguments, tmp_path, capsys):
    write_image(tmp_path / "a" / "x.jfif")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    args = arguments("--input", tmp_path / "a", "--output", tmp_path / "out")
    assert demo.run(args) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["x.jfif.png"]
    assert "a: left out as no images: notes.txt\n" in capsys.readouterr().err


def test_names_of_drawings(tmp_path):
    out = str(tmp_path / "out")
    images = ["a/x.jpg", "b/x.jpg", "a/x.gif", "a/x.gif.png", "a/X.JPG", "a/noname"]
    drawings = files_of_the_demo.name_drawings(dict.fromkeys(images, 2), out)
    names = [os.path.relpath(drawing, out) for drawing in drawings]
    assert names == ["x.jpg", "x_2.jpg", "x.gif.png", "x.gif_2.png", "X_3.JPG", "noname.png"]
    for name in names:
        path = os.path.join(out, name)
        files_of_the_demo.write_image(path, np.full((20, 30, 3), (0, 0, 200), np.uint8))
        assert abs(cv2.imread(path)[10, 10].astype(int) - (0, 0, 200)).max() < 8


def test_broken_inputs_of_every_kind_are_skipped(arguments, tmp_path, capsys):
    write_image(tmp_path / "a" / "good.png")
    (tmp_path / "a" / "empty.png").write_bytes(b"")
    (tmp_path / "a" / "huge.pbm").write_bytes(b"P4 20000 20000 ")
    (tmp_path / "a" / "text.gif").write_text("no image")
    (tmp_path / "a" / "link.jpg").symlink_to(tmp_path / "missing")
    (tmp_path / "x.jpg").mkdir()
    document = tmp_path / "document.pdf"
    document.write_bytes(b"%PDF-1.7")
    args = ["--input", tmp_path / "a", tmp_path / "x.jpg", document, "--output", tmp_path / "out"]

    assert demo.run(arguments(*args)) == 1

    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.png"]
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("skipped: ")]
    for name in ("empty.png", "huge.pbm", "text.gif", "link.jpg", "x.jpg", "document.pdf"):
        assert sum(name in line for line in lines) == 1
    assert len(lines) == 6


@pytest.mark.parametrize(
    "mode, values", [("L", np.uint8), ("RGBA", np.uint8), ("I;16", np.uint16), ("P", None)]
)
def test_kinds_of_images(arguments, tmp_path, monkeypatch, mode, values):
    if mode == "P":
        image = Image.new("RGB", (30, 20)).convert("P")
    else:
        shape = (20, 30, 4) if mode == "RGBA" else (20, 30)
        image = Image.fromarray(np.full(shape, np.iinfo(values).max // 2, values))
    assert image.mode == mode
    image.save(tmp_path / "image.png")
    seen = []
    monkeypatch.setattr(demo, "Detector", stand_in(seen=seen))

    output = tmp_path / "drawing.png"
    assert demo.run(arguments("--input", tmp_path / "image.png", "--output", output)) == 0
    assert seen[0].shape == (20, 30, 3) and seen[0].dtype == np.uint8


def test_exif_rotation(arguments, tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (30, 20)).save(tmp_path / "image.jpg", exif=exif)
    seen = []
    monkeypatch.setattr(demo, "Detector", stand_in(seen=seen))

    demo.run(arguments("--input", tmp_path / "image.jpg", "--output", tmp_path / "out.jpg"))
    assert seen[0].shape == (30, 20, 3)


def stand_in(metadata=None, instances=None, seen=None):
    """A class of detectors that notes the images and gives the same instances for each."""

    class StandIn(Detector):
        def __init__(self, **_):
            self.metadata = metadata or Metadata()

        def __call__(self, images, batch_size=1):
            if isinstance(images, np.ndarray):
                return self([images])[0]
            if seen is not None:
                seen.extend(images)
            return [instances or Instances(image.shape[:2], **fields) for image in images]

        def draw(self, image, instances, threshold):
            return draw_detections(image, instances, self.metadata)

    fields = {
        "pred_boxes": Boxes(torch.zeros(0, 4)),
        "scores": torch.zeros(0),
        "pred_classes": torch.zeros(0, dtype=torch.int64),
    }
    return StandIn


@pytest.mark.parametrize("video", [False, True])
def test_class_names_in_any_script(arguments, tmp_path, monkeypatch, video):
    """Matplotlib warns of letters that it has no font for."""
    metadata = Metadata(thing_classes=["三角形"], thing_colors=[[255, 0, 0]])
    instances = Instances(
        (40, 60),
        pred_boxes=Boxes(torch.tensor([[5.0, 5.0, 25.0, 30.0]])),
        scores=torch.tensor([0.87]),
        pred_classes=torch.tensor([0]),
    )
    monkeypatch.setattr(demo, "Detector", stand_in(metadata, instances))
    if video:
        source = tmp_path / "clip.avi"
        writer = cv2.VideoWriter(str(source), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
        writer.write(np.zeros((48, 64, 3), np.uint8))
        writer.release()
        inputs = ["--video-input", source]
    else:
        inputs = ["--input", write_image(tmp_path / "image.png")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert demo.run(arguments(*inputs, "--output", tmp_path / "out")) == 0


def test_video(arguments, tmp_path):
    source = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    assert writer.isOpened()
    for _ in range(3):
        writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()

    assert demo.run(arguments("--video-input", source, "--output", tmp_path / "out")) == 0

    drawn = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert drawn.get(cv2.CAP_PROP_FRAME_WIDTH) == 64


@pytest.mark.parametrize(
    "message, args, opts",
    [
        ("nothing to detect on", ["--input", "{}/*.bmp", "--output", "{}/out"], []),
        ("holds no image", ["--input", "{}", "--output", "{}/out"], []),
        ("there are 2 images", ["--input", "{}/images", "--output", "{}/out.png"], []),
        ("would replace the input", ["--input", "{}/images", "--output", "{}/images"], []),
        ("not written in this", ["--input", "{}/images/a.png", "--output", "{}/o.gif"], []),
        ("cannot create", ["--input", "{}/images", "--output", "{}/text.avi/out"], []),
        ("no display", ["--input", "{}/images"], []),
        ("is no score", ["--webcam", "--output", "{}", "--confidence-threshold", "1.5"], []),
        ("missing.avi does not exist", ["--video-input", "missing.avi", "--output", "{}"], []),
        ("cannot open the video", ["--video-input", "{}/text.avi", "--output", "{}"], []),
        ("would replace the input", ["--video-input", "{}/clip.mp4", "--output", "{}"], []),
        ("no weights", ["--input", "{}/images", "--output", "{}/out"], ["MODEL.WEIGHTS", ""]),
        (
            "missing.pth",
            ["--input", "{}/images", "--output", "{}"],
            ["MODEL.WEIGHTS", "missing.pth"],
        ),
        ("MODEL.WEIGHTS", ["--input", "{}/images", "--output", "{}"], ["MODEL.WIGHTS", "x"]),
    ],
)
def test_mistakes(arguments, tmp_path, monkeypatch, capsys, message, args, opts):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    write_image(tmp_path / "images" / "a.png")
    write_image(tmp_path / "images" / "b.png")
    (tmp_path / "text.avi").write_text("no video")
    (tmp_path / "clip.mp4").write_text("no video")

    with pytest.raises(SystemExit) as exit, exit_on_user_error():
        demo.run(arguments(*(arg.format(tmp_path) for arg in args), opts=opts))

    assert exit.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == ["a.png", "b.png"]


def test_headless_opencv_is_told(monkeypatch):
    def refuse(*_):
        raise cv2.error("The function is not implemented")

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(cv2, "namedWindow", refuse)
    with pytest.raises(UserError, match="opencv-python-headless"):
        window.check_windows()
