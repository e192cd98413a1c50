"""demo/demo.py with a tiny detector of random weights."""

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data.catalog import Metadata
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image

from ddetr_d2.checkpoint import DetrCheckpointer
from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError, exit_on_user_error

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "demo"))  # as Python does for the program

import images  # noqa: E402
import predictor  # noqa: E402
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
        return [*fixed, *map(str, args), "--opts", "MODEL.WEIGHTS", str(files / weights), *opts]

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

    assert demo.main(arguments("--input", *inputs, "--output", out)) == 0

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

    assert demo.main(arguments(*inputs, "--output", tmp_path / "out")) == 1

    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good.png"]
    err = capsys.readouterr().err
    for name in ("cut.jpg", "text.png", "missing.png"):
        assert f"{name}" in err
    assert "3 inputs were skipped" in err

    assert demo.main(arguments("--input", good, "--output", out)) == 0
    assert out.is_file()


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
    monkeypatch.setattr(demo, "load_model", lambda *_: (None, Metadata()))
    monkeypatch.setattr(images, "detect", lambda _, image, __: seen.append(image) or no_instances())

    output = tmp_path / "drawing.png"
    assert demo.main(arguments("--input", tmp_path / "image.png", "--output", output)) == 0
    assert seen[0].shape == (20, 30, 3) and seen[0].dtype == np.uint8


def test_exif_rotation(arguments, tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (30, 20)).save(tmp_path / "image.jpg", exif=exif)
    seen = []
    monkeypatch.setattr(demo, "load_model", lambda *_: (None, Metadata()))
    monkeypatch.setattr(images, "detect", lambda _, image, __: seen.append(image) or no_instances())

    demo.main(arguments("--input", tmp_path / "image.jpg", "--output", tmp_path / "out.jpg"))
    assert seen[0].shape == (30, 20, 3)


def no_instances():
    return Instances((20, 30), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0))


def test_class_names_of_the_checkpoint(files):
    _, metadata = predictor.load_model(
        str(files / "config.yaml"), ["MODEL.WEIGHTS", str(files / "named.pth")]
    )
    assert metadata.thing_classes == NAMES


def test_class_names_of_detectron2s_data_set(files, monkeypatch):
    monkeypatch.setattr(predictor, "Predictor", lambda cfg: cfg)  # COCO's 80 classes do not fit
    cfg, metadata = predictor.load_model(
        str(files / "config.yaml"),
        ["MODEL.WEIGHTS", str(files / "nameless.pth"), "DATASETS.TEST", "('coco_2017_val',)"],
    )
    assert metadata.thing_classes[:2] == ["person", "bicycle"]
    assert cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES == 80


def test_without_class_names_the_number_is_needed(files):
    opts = ["MODEL.WEIGHTS", str(files / "nameless.pth")]
    with pytest.raises(UserError, match="NUM_CLASSES"):
        predictor.load_model(str(files / "config.yaml"), opts)
    opts += ["MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3"]
    _, metadata = predictor.load_model(str(files / "config.yaml"), opts)
    assert metadata.get("thing_classes") is None


def test_labels_say_class_and_score(monkeypatch):
    labels = []
    monkeypatch.setattr(
        images.Visualizer, "draw_text", lambda self, text, *_, **__: labels.append(text)
    )
    instances = Instances(
        (40, 60),
        pred_boxes=Boxes(torch.tensor([[5.0, 5.0, 25.0, 30.0]])),
        scores=torch.tensor([0.87]),
        pred_classes=torch.tensor([0]),
    )
    metadata = Metadata(thing_classes=NAMES, thing_colors=[[255, 0, 0]] * 3)
    drawing = images.draw(np.zeros((40, 60, 3), np.uint8), instances, metadata)
    assert labels == ["RBC 87%"]
    assert drawing.shape[1] >= images.MIN_DRAWING_SIZE / 2
    assert drawing.max() > 0


def test_video(arguments, tmp_path):
    source = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(source), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 48))
    assert writer.isOpened()
    for _ in range(3):
        writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()

    assert demo.main(arguments("--video-input", source, "--output", tmp_path / "out")) == 0

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
        demo.main(arguments(*(arg.format(tmp_path) for arg in args), opts=opts))

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
