"""demo/demo.py --save-detections, --recursive, several processes, and runs that go on."""

import csv
import json
import os
import shutil
import socket
import sys
import time

from ddetr_d2 import Detector
from ddetr_d2.checkpoint import DetrCheckpointer
from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image
from pycocotools.coco import COCO

from .conftest import ROOT, TINY
from .programs import Program

sys.path.insert(0, str(ROOT / "demo"))  # as Python does for the program

import files as files_of_the_demo  # noqa: E402
from detections import DetectionParts  # noqa: E402

import demo  # noqa: E402

NAMES = ["circle", "square", "star"]


@pytest.fixture(autouse=True)
def no_log(monkeypatch):
    """Detectron2's loggers would keep the stdout of the first test. There is no window."""
    monkeypatch.setattr(demo, "setup_logger", lambda **_: None)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with model.pth, other.pth (of other weights) and photos/."""
    folder = tmp_path_factory.mktemp("detections")
    classes = ["MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3"]
    cfg = setup_cfg(str(ROOT / "configs" / "deformable_detr_refine.yaml"), [*TINY, *classes])
    for seed, name in enumerate(["model", "other"]):
        torch.manual_seed(seed)
        model = build_model(cfg).eval()
        for head in model.transformer.decoder.heads:  # boxes and scores that differ
            torch.nn.init.normal_(head.bbox_embed[-2].weight, std=0.2)
            torch.nn.init.normal_(head.class_embed.weight, std=0.3)
        checkpointer = DetrCheckpointer(model, str(folder), class_names=NAMES, config=cfg.dump())
        checkpointer.save(name)
    generator = np.random.default_rng(0)
    for name in ("x.png", "b/x.png", "a/y.png", "a/deep/x.png", "b/z.jpg", "c.png"):
        path = folder / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (30, 40 + len(name), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture(scope="module")
def detector(folder):
    return Detector(folder / "model.pth")


@pytest.fixture(scope="module")
def threshold(folder, detector):
    """A score that some detections have and some have not."""
    paths = sorted((folder / "photos").rglob("*.*g"))
    return float(torch.cat([i.scores for i in detector(paths)]).quantile(0.8))


@pytest.fixture
def arguments(folder, threshold, monkeypatch):
    monkeypatch.chdir(folder)

    def build(*args, weights="model.pth", opts=()):
        fixed = ["--confidence-threshold", threshold, "--recursive", "--input", "photos"]
        return [*map(str, fixed), *map(str, args), "--opts", "MODEL.WEIGHTS", weights, *opts]

    return build


@pytest.fixture
def run(arguments):
    def run(*args, **more):
        return demo.run(demo.get_parser().parse_args(arguments(*args, **more)))

    return run


# In the order of the folders: files first.
FILES = ["c.png", "x.png", "a/y.png", "a/deep/x.png", "b/x.png", "b/z.jpg"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_coco_results(run, tmp_path, detector, threshold, batch_size):
    path = tmp_path / "found.json"
    assert run("--save-detections", path, "--batch-size", batch_size) == 0
    assert sorted(os.listdir(tmp_path)) == ["found.images.json", "found.json"]

    images = COCO(str(tmp_path / "found.images.json"))
    results = images.loadRes(str(path))
    assert [image["file_name"] for image in images.dataset["images"]] == [
        f"photos/{name}" for name in FILES
    ]
    assert [c["name"] for c in images.loadCats(images.getCatIds())] == NAMES
    count = 0
    paths = [image["file_name"] for image in images.dataset["images"]]
    everything = detector(paths, batch_size=batch_size)
    for image, wanted in zip(images.dataset["images"], everything, strict=True):
        wanted = wanted[wanted.scores >= threshold]
        assert (image["height"], image["width"]) == wanted.image_size
        found = results.imgToAnns[image["id"]]
        assert len(found) == len(wanted)
        boxes = torch.tensor([d["bbox"] for d in found]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        torch.testing.assert_close(boxes, wanted.pred_boxes.tensor, rtol=0, atol=0.02)
        scores = torch.tensor([d["score"] for d in found])
        torch.testing.assert_close(scores, wanted.scores, rtol=0, atol=1e-4)
        names = [images.cats[d["category_id"]]["name"] for d in found]
        assert names == [NAMES[number] for number in wanted.pred_classes]
        count += len(found)
    assert 5 < count < 300


def test_csv(run, tmp_path):
    assert run("--save-detections", tmp_path / "found.json") == 0
    assert run("--save-detections", tmp_path / "found.csv") == 0
    results = json.loads((tmp_path / "found.json").read_text())
    with open(tmp_path / "found.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results)
    for row, result in zip(rows, results, strict=True):
        assert row["file"] == f"photos/{FILES[result['image_id'] - 1]}"
        assert row["class"] == NAMES[result["category_id"] - 1]
        assert float(row["score"]) == result["score"]
        x, y, width, height = result["bbox"]
        corners = [float(row[name]) for name in ("x1", "y1", "x2", "y2")]
        assert corners == pytest.approx([x, y, x + width, y + height], abs=0.011)


def test_drawings_keep_the_folders(run, tmp_path):
    """Those of an earlier run are not searched."""
    shutil.copytree("photos", tmp_path / "photos")
    drawings = tmp_path / "photos" / "drawings"
    for _ in range(2):
        more = ["--input", tmp_path / "photos", "--output", drawings]
        assert run(*more, "--save-detections", tmp_path / "found.csv") == 0
        drawn = [str(p.relative_to(drawings)) for p in drawings.rglob("*.*")]
        assert sorted(drawn) == sorted(FILES)
    assert (tmp_path / "found.csv").exists()


def test_folders_that_are_searched(tmp_path):
    for name in ("a/x.png", "a/.hidden/x.png", "b/c/d/x.png", "b/e/notes.txt"):
        path = tmp_path / "top" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "docs" / "images" / "cost.png", path)
    (tmp_path / "top" / "b" / "loop").symlink_to(tmp_path / "top")
    top = str(tmp_path / "top")
    images, problems, [message] = files_of_the_demo.find_images([top], recursive=True)
    assert {path[start:] for path, start in images.items()} == {"a/x.png", "b/c/d/x.png"}
    assert not problems
    assert message.endswith("left out as no images: b/e/notes.txt, b/loop/")
    images, [message], _ = files_of_the_demo.find_images([top])
    assert not images and message.endswith("holds no image; it holds a/, b/")


@pytest.fixture
def interrupted(run, tmp_path, monkeypatch):
    """Run up to the fourth image and leave half a line; returns the file of detections."""
    path = tmp_path / "found.json"
    seen = []

    def limited(self, images, batch_size=1):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.extend(images)
        return original(self, images, batch_size)

    original = Detector.__call__
    with monkeypatch.context() as patch:
        patch.setattr(Detector, "__call__", limited)
        with pytest.raises(KeyboardInterrupt):
            run("--save-detections", path)
    assert os.listdir(tmp_path) == ["found.json.parts"]
    part = tmp_path / "found.json.parts" / "00000.jsonl"
    lines = part.read_text().splitlines(keepends=True)
    assert len(lines) == 3
    part.write_text("".join(lines[:2]) + lines[2][: len(lines[2]) // 2])
    return path


def test_a_run_goes_on(run, interrupted, tmp_path, monkeypatch, capsys):
    seen = []
    original = Detector.__call__

    def counted(self, images, batch_size=1):
        seen.extend(images)
        return original(self, images, batch_size)

    with monkeypatch.context() as patch:
        patch.setattr(Detector, "__call__", counted)
        assert run("--save-detections", interrupted) == 0
    assert len(seen) == 4
    assert "2 of 6 images were done before" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["found.images.json", "found.json"]
    assert run("--save-detections", tmp_path / "whole.json") == 0
    for kind in ("json", "images.json"):
        assert (tmp_path / f"found.{kind}").read_text() == (tmp_path / f"whole.{kind}").read_text()


@pytest.mark.parametrize(
    "args, more, message",
    [
        (
            ["--confidence-threshold", "0.25"],
            {},
            r"ended, with --confidence-threshold 0\.\d+: give",
        ),
        ([], {"weights": "other.pth"}, "ended, with other weights: give the same"),
        ([], {"opts": ["INPUT.MIN_SIZE_TEST", "64"]}, "ended, with other configuration: give"),
        (["--output", "drawings"], {}, "ended, without --output: give the same to go on with it"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings(
    run, interrupted, tmp_path, monkeypatch, args, more, message
):
    args = [tmp_path / arg if arg == "drawings" else arg for arg in args]
    with pytest.raises(UserError, match=f"found.json.parts has the detections of a run.*{message}"):
        run("--save-detections", interrupted, *args, **more)
    assert (
        len((interrupted.parent / "found.json.parts" / "00000.jsonl").read_text().split("\n")) == 3
    )
    shutil.rmtree(f"{interrupted}.parts")
    assert run("--save-detections", interrupted, *args, **more) == 0


def test_unreadable_images_are_left_out(run, tmp_path, capsys):
    shutil.copytree("photos", tmp_path / "photos")
    broken = tmp_path / "photos" / "b" / "x.png"
    broken.write_bytes(broken.read_bytes()[:50])
    args = ["--input", tmp_path / "photos", "--save-detections", tmp_path / "other.json"]
    assert run(*args) == 1
    assert "x.png" in capsys.readouterr().err
    images = json.loads((tmp_path / "other.images.json").read_text())["images"]
    assert [image["id"] for image in images] == [1, 2, 3, 4, 5]
    assert not any(image["file_name"] == str(broken) for image in images)


def test_two_runs_do_not_write_one_file(tmp_path):
    path = str(tmp_path / "found.json")
    with DetectionParts(path, {}):
        with pytest.raises(UserError, match="another run writes .*found.json; wait for its end"):
            DetectionParts(path, {})
    DetectionParts(path, {}).__exit__()


def start_two(arguments):
    """Two processes, as torchrun starts them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    sizes = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = ({"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1"))
    return [
        Program(ROOT / "demo" / "demo.py", *arguments, env=address | sizes | own) for own in ranks
    ]


def test_several_processes_that_are_killed_go_on(run, arguments, folder, tmp_path):
    many = tmp_path / "many"
    for number in range(10):
        shutil.copytree(folder / "photos", many / str(number))
    args = ["--input", many, "--save-detections", tmp_path / "found.json"]
    absolute = arguments(*args, weights=str(folder / "model.pth"))
    processes = start_two(absolute)
    parts = [tmp_path / "found.json.parts" / f"0000{rank}.jsonl" for rank in range(2)]
    end = time.monotonic() + 60
    while time.monotonic() < end and not all(p.exists() and p.stat().st_size for p in parts):
        time.sleep(0.01)
    for program in processes:
        program.process.kill()
    errors = [program.wait().stderr for program in processes]
    assert not (tmp_path / "found.json").exists(), errors
    shares = [{line.split(",")[0] for line in part.read_text().splitlines()} for part in parts]
    assert all(shares) and not shares[0] & shares[1], errors
    assert sum(map(len, shares)) < 60

    for program in start_two(absolute):
        done = program.wait()
        assert done.returncode == 0, done.stderr
    assert run(*args[:-1], tmp_path / "whole.json") == 0
    assert (tmp_path / "found.json").read_text() == (tmp_path / "whole.json").read_text()
    assert not (tmp_path / "found.json.parts").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--save-detections", "found.txt"], "found.txt; give a name that ends in .json or .csv"),
        (["--save-detections", "{}/folder.csv"], "folder.csv is a folder; give the name of a file"),
        (["--save-detections", "{}/file/found.csv"], "found.csv cannot be written: "),
        (["--save-detections", "found.csv", "--show-sampling"], "is drawn, not saved; give --outp"),
        (["--output", "{}", "--show-sampling", "--batch-size", "2"], "give --batch-size 1"),
        (["--output", "{}", "--batch-size", "0"], "--batch-size 0; give 1 or more"),
    ],
)
def test_mistakes(run, tmp_path, args, message):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=message):
        run(*(arg.format(tmp_path) for arg in args))


def test_videos_are_not_saved(tmp_path):
    args = ["--video-input", "x.avi", "--save-detections", str(tmp_path / "found.csv")]
    with pytest.raises(UserError, match="--save-detections is for images only"):
        demo.run(demo.get_parser().parse_args(args))
