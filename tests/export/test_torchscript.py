"""TorchScript files."""

from ddetr_d2.errors import UserError
from ddetr_d2.export import ExportableDetector
from ddetr_d2.export.formats import write_torchscript
from ddetr_d2.export.verify import load_torchscript

import pytest

from ..conftest import MEMBERS

GATHER = "deformable_detr_refine_two_stage"


@pytest.mark.parametrize(
    "variant, sampling", [*((variant, "grid_sample") for variant in MEMBERS), (GATHER, "gather")]
)
def test_same_detections(variant, sampling, build, check, tmp_path):
    model, path = build(variant), str(tmp_path / "model.ts")
    metadata = {"class_names": ["cat", "鳥"], "preprocess": True}
    write_torchscript(ExportableDetector(model, sampling=sampling), path, metadata)
    run, read = load_torchscript(path)
    assert read == metadata
    assert "ddetr_d2::" not in str(run.inlined_graph)  # no operator of ddetr_d2
    check(model, run)


def test_processing_outside(build, check, tmp_path):
    model, path = build("deformable_detr_refine_two_stage"), str(tmp_path / "model.ts")
    options = {"preprocess": False, "postprocess": False}
    write_torchscript(ExportableDetector(model, **options), path, {})
    check(model, load_torchscript(path)[0], **options)


def test_the_compiled_operator_is_refused(build, tmp_path):
    detector = ExportableDetector(build("deformable_detr_single_scale"), sampling="operator")
    with pytest.raises(UserError, match="choose grid_sample or gather"):
        write_torchscript(detector, str(tmp_path / "model.ts"), {})
