"""The library by which onnxruntime runs files of sampling "extension"."""

import os
import shutil

from ddetr_d2.errors import UserError
from ddetr_d2.export import ExportableDetector, onnxruntime_extension
from ddetr_d2.export.formats import write_onnx
from ddetr_d2.export.verify import load_onnx
from ddetr_d2.layers import ms_deform_attn

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from .test_metadata import onnx_demo
from .test_openvino import VARIANTS

COMPILER = os.environ.get("CXX", "c++").split()[0]


@pytest.fixture(scope="module")
def extension(tmp_path_factory):
    if shutil.which(COMPILER) is None:
        pytest.skip(f"there is no C++ compiler {COMPILER!r}")
    path = str(tmp_path_factory.mktemp("extension") / "extension.so")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXXFLAGS", "-O0")  # in a tenth of the time
        onnxruntime_extension.build(path)
    return path


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_detections(variant, build, check, extension, tmp_path):
    model, path = build(variant), str(tmp_path / "model.onnx")
    write_onnx(ExportableDetector(model, sampling="extension"), path, {})
    check(model, load_onnx(path, extension)[0])


def test_demo(build, check, extension, tmp_path, monkeypatch, capsys):
    model, path = build("deformable_detr_refine"), str(tmp_path / "model.onnx")
    detector = ExportableDetector(model, sampling="extension")
    write_onnx(detector, path, {})
    run, _ = onnx_demo.load_in_onnxruntime(path, extension)

    def run_tensors(*inputs):
        arrays = zip(detector.input_names, inputs, strict=True)
        return [torch.from_numpy(output) for output in run({k: x.numpy() for k, x in arrays})]

    check(model, run_tensors)

    drawing = str(tmp_path / "drawing.png")
    monkeypatch.setattr("sys.argv", ["onnx_demo.py", path, path, drawing])
    with pytest.raises(SystemExit) as stop:
        onnx_demo.main()
    assert stop.value.code == 2
    assert "onnxruntime cannot run" in capsys.readouterr().err


def attention(extension):
    """A file of the operator alone, in a session with two threads."""
    floats = dict.fromkeys(("value", "locations", "weights"), TensorProto.FLOAT)
    types = {**floats, "shapes": TensorProto.INT64}
    names = ["value", "shapes", "locations", "weights"]
    inputs = [helper.make_tensor_value_info(name, types[name], None) for name in names]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    node = helper.make_node("MSDeformAttn", names, ["output"], domain="ddetr_d2")
    graph = helper.make_graph([node], "attention", inputs, [output])
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("ddetr_d2", 1)]
    file = helper.make_model(graph, opset_imports=sets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.register_custom_ops_library(extension)
    session = onnxruntime.InferenceSession(file.SerializeToString(), options)
    return lambda **arrays: session.run(None, arrays)[0]


def arrays(queries):
    random = np.random.default_rng(0)
    return {
        "value": random.random((2, 4 * 5 + 2 * 3, 8, 16), np.float32),
        "shapes": np.array([[4, 5], [2, 3]]),
        "locations": random.random((2, queries, 8, 2, 4, 2), np.float32),
        "weights": random.random((2, queries, 8, 2, 4), np.float32),
    }


def test_all_rows_by_several_threads(extension):
    inputs = arrays(700)
    expected = _reference(**inputs)
    actual = attention(extension)(**inputs)
    assert actual.shape == (2, 700, 128)
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def _reference(value, shapes, locations, weights):
    value, locations, weights = map(torch.from_numpy, (value, locations, weights))
    return ms_deform_attn(value, shapes.tolist(), [0, 20], locations, weights).numpy()


def test_no_queries(extension):
    assert attention(extension)(**arrays(0)).shape == (2, 0, 128)


@pytest.mark.parametrize("name", ["value", "shapes", "locations", "weights"])
def test_shapes_that_do_not_go_together(name, extension):
    inputs = arrays(3)
    inputs[name] = inputs[name][:, :1]
    with pytest.raises(Exception, match="MSDeformAttn: shapes do not go together"):
        attention(extension)(**inputs)


def test_no_extension(tmp_path):
    wrong = tmp_path / "wrong.so"
    wrong.write_text("no library")
    with pytest.raises(UserError, match=r"wrong.so is no extension of onnxruntime"):
        load_onnx("model.onnx", str(wrong))


def test_compiler_that_fails(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no C\\+\\+ compiler 'no-such-compiler'"):
        onnxruntime_extension.build(str(tmp_path / "extension.so"))
