"""ONNX files, run by onnxruntime."""

from ddetr_d2.errors import UserError
from ddetr_d2.export import ExportableDetector
from ddetr_d2.export.formats import write_onnx
from ddetr_d2.export.verify import load_onnx

import onnx
import pytest

from ..conftest import MEMBERS


@pytest.mark.parametrize("variant", MEMBERS)
def test_same_detections(variant, build, check, tmp_path):
    model, path = build(variant), str(tmp_path / "model.onnx")
    write_onnx(ExportableDetector(model), path, {})
    run, _ = load_onnx(path)
    check(model, run)


@pytest.mark.parametrize(
    "variant, opset", [("deformable_detr_refine_two_stage", 16), ("deformable_detr", 20)]
)
def test_gather(variant, opset, build, check, tmp_path):
    model, path = build(variant), str(tmp_path / "model.onnx")
    write_onnx(ExportableDetector(model, sampling="gather"), path, {}, opset)
    nodes = onnx.load(path).graph.node
    assert "GridSample" not in {node.op_type for node in nodes}
    check(model, load_onnx(path)[0])


@pytest.mark.parametrize("preprocess, postprocess", [(False, True), (True, False), (False, False)])
def test_processing_outside(preprocess, postprocess, build, check, tmp_path):
    model, path = build("deformable_detr_refine_two_stage"), str(tmp_path / "model.onnx")
    options = {"preprocess": preprocess, "postprocess": postprocess}
    write_onnx(ExportableDetector(model, **options), path, {})
    check(model, load_onnx(path)[0], **options)


@pytest.mark.parametrize("opset", [16, 20])
def test_operators_are_standard_ones_of_the_wanted_set(opset, build, check, tmp_path):
    model, path = build("deformable_detr_refine"), str(tmp_path / "model.onnx")
    write_onnx(ExportableDetector(model), path, {}, opset)
    file = onnx.load(path)
    assert [(entry.domain, entry.version) for entry in file.opset_import] == [("", opset)]
    assert {node.domain for node in file.graph.node} == {""}
    assert not file.functions
    check(model, load_onnx(path)[0])


def test_proposals_at_the_border(build, check, tmp_path):
    """Centres at 0.01 and 0.99 exactly, see tests/modeling/test_queries.py."""
    # A query for every token, so that one on the wrong side shows.
    queries = ("MODEL.DEFORMABLE_DETR.NUM_QUERIES", "2300")
    model = build("deformable_detr_refine_two_stage", *queries)
    path = str(tmp_path / "model.onnx")
    options = {"postprocess": False}
    write_onnx(ExportableDetector(model, **options), path, {})
    check(model, load_onnx(path)[0], {"border": [(160, 400), (192, 520)]}, **options)


def test_few_tokens_and_few_pairs(build, check, tmp_path):
    """Fewer tokens than queries, and fewer pairs of query and class than detections, later."""
    model = build("deformable_detr_refine_two_stage", "MODEL.DEFORMABLE_DETR.NUM_QUERIES", "60")
    path = str(tmp_path / "model.onnx")
    write_onnx(ExportableDetector(model), path, {})
    check(model, load_onnx(path)[0], {"small": [(33, 40)], "tiny": [(1, 30)], "large": [(150, 90)]})


def test_backbone_of_padded_sizes(build, check, tmp_path):
    model, path = build("deformable_detr", *FPN), str(tmp_path / "model.onnx")
    write_onnx(ExportableDetector(model), path, {})
    check(model, load_onnx(path)[0], {"padded": [(95, 130), (121, 88)]})


FPN = [
    *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
    *("MODEL.FPN.IN_FEATURES", "['res3','res4','res5']"),
    *("MODEL.DEFORMABLE_DETR.IN_FEATURES", "['p3','p4','p5']"),
]


def test_metadata_and_names(build, tmp_path):
    path = str(tmp_path / "model.onnx")
    metadata = {"class_names": ["cat", "Hund", "鳥"], "preprocess": True, "longest_side": 1333}
    write_onnx(ExportableDetector(build("deformable_detr_single_scale")), path, metadata)
    assert load_onnx(path)[1] == metadata
    graph = onnx.load(path).graph
    shapes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {
        "images": ["batch", 3, "height", "width"],
        "image_sizes": ["batch", 2],
        "output_sizes": ["batch", 2],
        "scores": ["batch", "detections"],
        "labels": ["batch", "detections"],
        "boxes": ["batch", "detections", 4],
    }


def test_mistakes(build, tmp_path):
    model, path = build("deformable_detr_single_scale"), tmp_path / "model.onnx"
    with pytest.raises(UserError, match="set 15 is not supported; choose 16 to 20"):
        write_onnx(ExportableDetector(model), str(path), {}, 15)
    with pytest.raises(UserError, match="choose grid_sample or gather"):
        write_onnx(ExportableDetector(model, sampling="operator"), str(path), {})
    assert not path.exists()


def test_deformable_convolutions_are_refused(build, tmp_path):
    small = ("MODEL.RESNETS.WIDTH_PER_GROUP", "1", "MODEL.RESNETS.DEPTH", "50")
    model = build("deformable_detr_refine_two_stage_x101_dcn", *small)
    with pytest.raises(UserError, match="deformable convolutions.*choose torchscript"):
        write_onnx(ExportableDetector(model), str(tmp_path / "model.onnx"), {})
