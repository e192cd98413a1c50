"""tools/export_model.py, and demo/onnx_demo.py on what it writes."""

import importlib.util
import subprocess
import sys

from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError
from ddetr_d2.export import LOADERS

import cv2
import numpy as np
import onnx
import pytest
import torch
from detectron2.modeling import build_model

from ..conftest import ROOT, TINY

SPEC = importlib.util.spec_from_file_location("export_tool", ROOT / "tools" / "export_model.py")
export_tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(export_tool)

CONFIG = str(ROOT / "configs" / "deformable_detr_single_scale.yaml")
SMALL = [*TINY, "MODEL.DEFORMABLE_DETR.DEC_LAYERS", "1", "INPUT.MAX_SIZE_TEST", "150"]
NAMES = ["cat", "dog", "a very long name"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Checkpoint of a tiny detector with three named classes, one of which it always sees."""
    torch.manual_seed(0)
    model = build_model(setup_cfg(CONFIG, [*SMALL, "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3"]))
    with torch.no_grad():
        model.transformer.decoder.heads[0].class_embed.bias[1] = 3.0
    path = tmp_path_factory.mktemp("weights") / "model.pth"
    torch.save({"model": model.state_dict(), "class_names": NAMES}, path)
    return str(path)


def export(weights, output, *arguments, format="onnx"):
    options = ["--config-file", CONFIG, "--format", format, "--output", str(output), *arguments]
    export_tool.main([*options, "--opts", *SMALL, "MODEL.WEIGHTS", weights])


@pytest.fixture
def photo(tmp_path):
    path = str(tmp_path / "photo.png")
    cv2.imwrite(path, np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8))
    return path


def test_onnx_file_and_demo(weights, photo, tmp_path, capsys):
    output, drawing = tmp_path / "new" / "model.onnx", tmp_path / "drawing.png"
    export(weights, output, "--sample-image", photo)
    assert "wrote" in capsys.readouterr().out
    assert [path.name for path in output.parent.iterdir()] == ["model.onnx"]
    _, metadata = LOADERS["onnx"](str(output))
    assert metadata["class_names"] == NAMES
    assert (metadata["shortest_side"], metadata["longest_side"]) == (96, 150)
    assert (metadata["channel_order"], metadata["layout"]) == ("RGB", "NCHW")
    assert metadata["pixel_mean"] == pytest.approx([123.675, 116.28, 103.53])

    demo = [sys.executable, str(ROOT / "demo" / "onnx_demo.py"), str(output)]
    done = subprocess.run([*demo, photo, str(drawing)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("dog 9")
    picture = cv2.imread(photo)
    drawn = cv2.imread(str(drawing))
    assert drawn.shape == picture.shape
    assert (drawn != picture).any()
    if importlib.util.find_spec("openvino"):
        other = [*demo, photo, str(drawing), "--runtime", "openvino"]
        again = subprocess.run(other, capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert again.stdout == done.stdout
    done = subprocess.run([*demo, "none.png", "x.png"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "none.png does not exist" in done.stderr


def test_demo_needs_no_more_than_a_runtime_numpy_and_opencv():
    lines = (ROOT / "demo" / "onnx_demo.py").read_text().splitlines()
    at_first = {line.split()[1] for line in lines if line.startswith(("import ", "from "))}
    assert at_first == {"argparse", "collections.abc", "json", "os", "cv2", "numpy"}
    later = {line.split()[1] for line in lines if line.startswith("    import ")}
    assert later == {"onnxruntime", "openvino"}


@pytest.mark.parametrize("format, name", [("torchscript", "model.ts"), ("torch_export", "m.pt2")])
def test_other_formats(format, name, weights, tmp_path):
    if format == "torch_export" and torch.__version__ < "2.11":
        pytest.skip("needs torch 2.11")
    output = tmp_path / name
    sampling = "operator" if format == "torch_export" else "gather"
    export(weights, output, "--sampling", sampling, "--no-preprocess", format=format)
    _, metadata = LOADERS[format](str(output))
    assert metadata["class_names"] == NAMES
    assert not metadata["preprocess"]
    assert metadata["input_names"] == ["images", "padding_mask", "output_sizes"]


def test_a_file_that_detects_something_else_is_not_kept(weights, tmp_path, monkeypatch):
    output = tmp_path / "model.onnx"
    output.write_text("the one before")
    write = export_tool.WRITERS["onnx"]

    def write_badly(detector, path, *args):
        write(detector, path, *args)
        model = onnx.load(path)
        for tensor in model.graph.initializer:
            if "class_embed.bias" in tensor.name:
                bias = onnx.numpy_helper.to_array(tensor) + 0.1
                tensor.CopyFrom(onnx.numpy_helper.from_array(bias.astype("float32"), tensor.name))
        onnx.save(model, path)

    monkeypatch.setitem(export_tool.WRITERS, "onnx", write_badly)
    with pytest.raises(UserError, match="does not detect what the model does"):
        export(weights, output)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert output.read_text() == "the one before"


@pytest.mark.parametrize(
    "format, name, arguments, message",
    [
        ("torchscript", "m.ts", ["--opset", "17"], "--opset 17 is for --format onnx"),
        ("onnx", "m.onnx", ["--sampling", "operator"], "is for --format torch_export"),
        ("torch_export", "m.bin", [], "end in .pt2"),
        ("onnx", "", [], "is a folder"),
        ("onnx", "m.onnx", ["--sample-image", "none.jpg"], "none.jpg"),
    ],
)
def test_mistakes(format, name, arguments, message, weights, tmp_path):
    with pytest.raises(UserError, match=message):
        export(weights, tmp_path / name, *arguments, format=format)
    assert not list(tmp_path.iterdir())


def test_weights_are_not_replaced_and_have_to_be_given(weights, tmp_path):
    with pytest.raises(UserError, match="would replace MODEL.WEIGHTS"):
        export(weights, weights)
    with pytest.raises(UserError, match="no weights: give MODEL.WEIGHTS"):
        export("", tmp_path / "m.onnx")


def test_missing_packages_are_named(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs the package onnx: pip install onnx"):
        export(weights, tmp_path / "m.onnx")
