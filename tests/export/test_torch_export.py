"""Programs of torch.export."""

from ddetr_d2.errors import UserError
from ddetr_d2.export import ExportableDetector
from ddetr_d2.export.formats import export_program, write_torch_export
from ddetr_d2.export.verify import load_torch_export

import pytest
import torch

from .test_onnx import FPN

pytestmark = pytest.mark.skipif(torch.__version__ < "2.11", reason="needs torch 2.11")


@pytest.mark.parametrize(
    "variant",
    ["deformable_detr_refine_two_stage", "deformable_detr", "deformable_detr_single_scale_dc5"],
)
def test_same_detections(variant, build, check):
    model = build(variant)
    program = export_program(ExportableDetector(model, sampling="operator"))
    operators = {str(node.target) for node in program.graph.nodes}
    assert any(name.startswith("ddetr_d2.ms_deform_attn") for name in operators)
    check(model, program.module())


def test_compiled_as_one_graph(build, check):
    model = build("deformable_detr_refine")
    program = export_program(ExportableDetector(model)).module()
    torch.compiler.reset()
    check(model, torch.compile(program, backend="eager", fullgraph=True))


def test_detr(build, check):
    model = build("detr")
    check(model, export_program(ExportableDetector(model)).module())


def test_file_of_standard_operators(build, check, tmp_path):
    model, path = build("deformable_detr_single_scale"), str(tmp_path / "model.pt2")
    metadata = {"class_names": ["cat", "鳥"], "preprocess": False}
    options = {"preprocess": False, "postprocess": False}
    write_torch_export(ExportableDetector(model, **options), path, metadata)
    run, read = load_torch_export(path)
    assert read == metadata
    assert not any("ddetr_d2" in str(node.target) for node in run.graph.nodes)
    check(model, run, **options)


def test_backbones_of_padded_sizes_are_refused(build):
    with pytest.raises(UserError, match="size is a multiple of 32"):
        export_program(ExportableDetector(build("deformable_detr", *FPN)))
