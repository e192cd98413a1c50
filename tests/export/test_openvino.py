"""ONNX files run by OpenVINO, and its extension with the kernels of the compiled operator."""

import os
import subprocess
import sys

from ddetr_d2.errors import UserError
from ddetr_d2.export import ExportableDetector
from ddetr_d2.export.formats import export_program, write_onnx, write_torchscript
from ddetr_d2.export.verify import load_onnx_in_openvino

import onnx
import pytest

# A library from ddetr_d2.export.openvino_extension, which takes a minute to build.
EXTENSION = os.environ.get("DDETR_D2_OPENVINO_EXTENSION", "")

# What is sampled, with offsets in pixels and in parts of a box.
VARIANTS = ["deformable_detr_refine_two_stage", "deformable_detr"]


def test_same_detections(build, check, tmp_path):
    pytest.importorskip("openvino")
    metadata = {"class_names": ["cat, small", "Hund", "鳥"], "preprocess": True}
    model, path = build("deformable_detr_refine"), str(tmp_path / "model.onnx")
    write_onnx(ExportableDetector(model), path, metadata)
    run, read = load_onnx_in_openvino(path)
    assert read == metadata
    check(model, run)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.skipif(not EXTENSION, reason="DDETR_D2_OPENVINO_EXTENSION names no library")
def test_extension(variant, build, check, tmp_path):
    model, path = build(variant), str(tmp_path / "model.onnx")
    write_onnx(ExportableDetector(model, sampling="extension"), path, {})
    check(model, load_onnx_in_openvino(path, EXTENSION)[0])


SIGNAL_AFTER_TWO_MODELS = """
import signal, sys
from ddetr_d2.export.verify import load_onnx_in_openvino
first = load_onnx_in_openvino(sys.argv[1])
second = load_onnx_in_openvino(sys.argv[1])
del first
del second
signal.signal(signal.SIGTERM, lambda number, frame: print("handled"))
signal.raise_signal(signal.SIGTERM)
"""


def test_signals_are_handled_after_several_models(build, tmp_path):
    pytest.importorskip("openvino")
    path = str(tmp_path / "model.onnx")
    write_onnx(ExportableDetector(build("deformable_detr_single_scale")), path, {})
    done = subprocess.run(
        [sys.executable, "-c", SIGNAL_AFTER_TWO_MODELS, path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "handled"


def test_one_operator_for_each_attention(build, tmp_path):
    model, path = build("deformable_detr_refine"), str(tmp_path / "model.onnx")
    write_onnx(ExportableDetector(model, sampling="extension"), path, {})
    file = onnx.load(path)
    assert {entry.domain: entry.version for entry in file.opset_import} == {"": 17, "ddetr_d2": 1}
    own = [node for node in file.graph.node if node.domain == "ddetr_d2"]
    layers = [*model.transformer.encoder.layers, *model.transformer.decoder.layers]
    assert [node.op_type for node in own] == ["MSDeformAttn"] * len(layers)
    assert "GridSample" not in {node.op_type for node in file.graph.node}


def test_in_pytorch_it_is_the_compiled_operator(build, check):
    model = build("deformable_detr_refine")
    check(model, ExportableDetector(model, sampling="extension"))


def test_mistakes(build, tmp_path):
    detector = ExportableDetector(build("deformable_detr_single_scale"), sampling="extension")
    with pytest.raises(UserError, match="'extension' is not for TorchScript"):
        write_torchscript(detector, str(tmp_path / "model.ts"), {})
    with pytest.raises(UserError, match="is for ONNX"):
        export_program(detector)
    pytest.importorskip("openvino")
    wrong = tmp_path / "wrong.so"
    wrong.write_text("no library")
    with pytest.raises(UserError, match="no extension for this version"):
        load_onnx_in_openvino("model.onnx", str(wrong))
