"""The whole model in all its variants."""

from ddetr_d2.engine import setup_cfg
from ddetr_d2.modeling.heads import Predictions

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from ..conftest import MEMBERS, ROOT, TINY

# Of the reference implementation with 91 classes, frozen batch norm left out.
PARAMETERS = {
    "deformable_detr": 40_069_665,
    "deformable_detr_refine": 40_849_660,
    "deformable_detr_refine_two_stage": 41_181_529,
    "deformable_detr_single_scale": 34_066_593,
    "deformable_detr_single_scale_dc5": 34_066_593,
    "detr": 41_524_768,
    "detr_dc5_plus": 41_575_711,
}


def build(variant, *opts, num_classes=3):
    classes = ("MODEL.DEFORMABLE_DETR.NUM_CLASSES", str(num_classes), "MODEL.DEVICE", "cpu")
    return build_model(setup_cfg(str(ROOT / "configs" / f"{variant}.yaml"), [*opts, *classes]))


def make_input(height, width, boxes, **extra):
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float).reshape(-1, 4))
    instances.gt_classes = torch.arange(len(boxes)) % 3
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return {"image": image, "instances": instances, **extra}


def make_batch():
    return [
        make_input(64, 96, [[5, 5, 40, 30], [50, 20, 90, 60]]),
        make_input(80, 48, [[10, 10, 30, 70]]),
    ]


@pytest.mark.parametrize("variant", MEMBERS)
def test_number_of_parameters(variant):
    model = build(variant, num_classes=91)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[variant]


@pytest.mark.parametrize("variant", [*MEMBERS, "two stages without refinement"])
def test_losses_fall_and_detections_come_out(variant):
    torch.manual_seed(0)
    extra = []
    if variant not in MEMBERS:
        variant, extra = "deformable_detr", ["MODEL.DEFORMABLE_DETR.TWO_STAGE", "True"]
    model = build(variant, *TINY, *extra)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = make_batch()
    totals = []
    for _ in range(20):
        losses = model(batch)
        assert all(torch.isfinite(loss) for loss in losses.values())
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert sum(totals[-3:]) < 0.8 * sum(totals[:3])
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []

    model.eval()
    with torch.no_grad():
        results = model(batch)
    for result in results:
        instances = result["instances"]
        # All pairs of query and class, fewer than 100; with a softmax the best class of a query.
        assert len(instances) == (20 if variant == "detr" else 20 * 3)
        assert instances.scores.diff().max() <= 0
        assert set(instances.pred_classes.tolist()) <= {0, 1, 2}


def test_detections_are_in_pixels_of_the_original_image():
    model = build("deformable_detr", *TINY).eval()
    logits = torch.full((1, 2, 3), -5.0)
    logits[0, 1, 2] = 3.0
    logits[0, 1, 0] = 1.0
    boxes = torch.tensor([[[0.5, 0.5, 0.1, 0.1], [0.25, 0.5, 0.5, 0.2]]])
    inputs = [{"height": 100, "width": 200}]
    (result,) = model.postprocess(Predictions(logits, boxes), inputs, [(50, 100)])
    instances = result["instances"]
    assert instances.image_size == (100, 200)
    assert instances.pred_classes[:2].tolist() == [2, 0]  # one query, two classes
    torch.testing.assert_close(instances.scores[:2], torch.tensor([3.0, 1.0]).sigmoid())
    torch.testing.assert_close(
        instances.pred_boxes.tensor[:2], torch.tensor([[0.0, 40, 100, 60]] * 2)
    )


def test_targets_are_fractions_of_the_unpadded_image():
    model = build("deformable_detr", *TINY)
    target = model._target(make_input(64, 96, [[24, 16, 72, 48]])["instances"])
    torch.testing.assert_close(target.boxes, torch.tensor([[0.5, 0.5, 0.5, 0.5]]))


@pytest.mark.parametrize("size", [(1, 400), (400, 1), (1, 1)])
@pytest.mark.parametrize("variant", ["deformable_detr", "deformable_detr_refine_two_stage"])
def test_images_one_pixel_wide(size, variant):
    model = build(variant, *TINY)
    losses = model([make_input(*size, []), make_input(64, 64, [[5, 5, 40, 30]])])
    assert all(torch.isfinite(loss) for loss in losses.values())
    model.eval()
    with torch.no_grad():
        (result,) = model([make_input(*size, [])])
    assert result["instances"].pred_boxes.tensor.isfinite().all()


def test_batch_of_images_without_objects():
    losses = build("deformable_detr_refine_two_stage", *TINY)([make_input(64, 64, [])])
    assert losses["loss_l1"] == 0
    assert losses["loss_class"] > 0


@pytest.mark.parametrize("config", ["r101", "x101", "x101_dcn"])
def test_stronger_backbones(config):
    small = [*TINY, "MODEL.RESNETS.WIDTH_PER_GROUP", "1", "MODEL.RESNETS.RES2_OUT_CHANNELS", "32"]
    model = build(f"deformable_detr_refine_two_stage_{config}", *small)
    losses = model(make_batch())
    sum(losses.values()).backward()
    offsets = [name for name, _ in model.named_parameters() if "conv2_offset" in name]
    assert bool(offsets) == (config == "x101_dcn")


def test_autocast_to_bfloat16():
    model = build("deformable_detr_refine_two_stage", *TINY)
    with torch.autocast("cpu", torch.bfloat16):
        total = sum(model(make_batch()).values())
    total.backward()
    assert torch.isfinite(total)
