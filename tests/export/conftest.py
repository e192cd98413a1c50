"""A tiny detector whose detections differ clearly, and what exported files are compared on."""

from ddetr_d2.engine import setup_cfg
from ddetr_d2.export import ExportableDetector, compare, example_inputs

import pytest
import torch
from detectron2.modeling import build_model

from ..conftest import ROOT, TINY

# Height and width of the images of each batch: odd, even, and two that are padded.
BATCHES = {
    "odd": [(101, 77)],
    "wide": [(70, 202)],
    "padded": [(95, 130), (121, 88)],
}
TOLERANCE = 1e-3


@pytest.fixture
def build():
    """Build a tiny detector of a variant; further options are those of the configuration.

    Fresh heads give every query the same score and box; random ones tell them apart.
    """

    def build(variant, *opts):
        torch.manual_seed(0)
        classes = ("MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3")
        cfg = setup_cfg(str(ROOT / "configs" / f"{variant}.yaml"), [*TINY, *classes, *opts])
        model = build_model(cfg).eval()
        for name, parameter in model.named_parameters():
            if "class_embed.weight" in name:
                torch.nn.init.normal_(parameter, std=0.5)
            elif ("bbox_embed" in name or "sampling_offsets" in name) and parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.1)
            elif "attention_weights.weight" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return model

    return build


@pytest.fixture
def check():
    """Compare a detector in another form with the model, on batches of several sizes."""

    def check(model, run, batches=BATCHES, **options):
        reference = ExportableDetector(model, sampling="operator", **options)
        for name, sizes in batches.items():
            differences = compare(reference, run, example_inputs(reference, *sizes))
            assert max(differences) < TOLERANCE, f"{name}: {differences}"

    return check
