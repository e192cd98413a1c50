"""Prediction heads."""

import math

from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError
from ddetr_d2.modeling.deformable_detr import level_projections
from ddetr_d2.modeling.feature_levels import FeatureProjection
from ddetr_d2.modeling.heads import DetectionHead, inverse_sigmoid

import pytest
import torch
from detectron2.modeling import build_model

from ..conftest import ROOT, TINY


def test_inverse_sigmoid_inverts_and_stays_finite():
    x = torch.linspace(0.01, 0.99, 9)
    torch.testing.assert_close(inverse_sigmoid(x).sigmoid(), x)
    extremes = inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    limit = math.log(1e-5)
    torch.testing.assert_close(extremes, torch.tensor([limit, limit, -limit, -limit]))


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_references_at_the_border(eps):
    """A box or point that lies on the border moves as if it was ``eps`` away from it."""
    cfg = ROOT / "configs" / "deformable_detr_refine.yaml"
    opts = [*TINY, "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3"]
    if eps != 1e-5:  # the default is the reference implementation's
        opts += ["MODEL.DEFORMABLE_DETR.INVERSE_SIGMOID_EPS", str(eps)]
    transformer = build_model(setup_cfg(str(cfg), opts)).eval().transformer
    torch.nn.init.constant_(transformer.queries.reference_points.bias, -20.0)
    shift = 0.7
    for head in transformer.decoder.heads:
        torch.nn.init.constant_(head.bbox_embed[-2].bias[:2], shift)
    projection = FeatureProjection(level_projections([64] * 4, 4, 64), 64)
    levels = projection([torch.randn(1, 64, 4, 4)] * 4, None)
    with torch.no_grad():
        layers, _ = transformer(levels)
    expected = math.log(eps / (1 - eps))
    for layer in layers:  # the first starts from a point, the second from the first one's box
        expected += shift
        torch.testing.assert_close(
            layer.boxes[..., :2].logit(), torch.full((1, 20, 2), expected), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("eps", ["0.0", "0.5", "-0.001"])
def test_impossible_limits(eps):
    cfg = str(ROOT / "configs" / "deformable_detr_refine.yaml")
    opts = [*TINY, "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3"]
    with pytest.raises(UserError, match=f"INVERSE_SIGMOID_EPS is {float(eps)}; it must be"):
        build_model(setup_cfg(cfg, [*opts, "MODEL.DEFORMABLE_DETR.INVERSE_SIGMOID_EPS", eps]))


def test_initial_predictions():
    head = DetectionHead(hidden_dim=32, num_outputs=7, size_bias=-2.0)
    torch.nn.init.zeros_(head.class_embed.weight)
    reference = torch.tensor([[[0.2, 0.7]]])
    logits, boxes = head(torch.randn(1, 1, 32), inverse_sigmoid(reference))
    torch.testing.assert_close(logits.sigmoid(), torch.full((1, 1, 7), 0.01))
    size = 1 / (1 + math.exp(2.0))
    torch.testing.assert_close(boxes, torch.tensor([[[0.2, 0.7, size, size]]]))

    head = DetectionHead(hidden_dim=32, num_outputs=7)
    reference = torch.tensor([[[0.2, 0.7, 0.1, 0.3]]])
    torch.testing.assert_close(
        head(torch.randn(1, 1, 32), inverse_sigmoid(reference)).boxes, reference
    )
