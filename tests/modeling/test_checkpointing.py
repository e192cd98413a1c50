"""MODEL.ACTIVATION_CHECKPOINT."""

from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from ..conftest import ROOT, TINY

PARTS = ["backbone", "encoder", "decoder"]


def build(parts, *opts, config="deformable_detr_refine_two_stage"):
    torch.manual_seed(0)
    opts = (*TINY, "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3", *opts)
    opts = (*opts, "MODEL.ACTIVATION_CHECKPOINT", str(parts))
    return build_model(setup_cfg(str(ROOT / "configs" / f"{config}.yaml"), [*opts])).train()


def gradients(model):
    """Gradients by name, and how many numbers autograd kept for them."""
    records = []
    for height, width in ((64, 96), (60, 80)):
        instances = Instances((height, width), gt_classes=torch.tensor([0, 2]))
        instances.gt_boxes = Boxes(torch.tensor([[4.0, 5, 40, 50], [20, 8, 60, 30]]))
        generator = torch.Generator().manual_seed(height)
        image = torch.randint(256, (3, height, width), generator=generator).byte()
        records.append({"image": image, "instances": instances})
    kept = 0

    def count(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = sum(model(records).values())
    loss.backward()
    names = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return names, kept


@pytest.mark.parametrize("config", ["deformable_detr_refine_two_stage", "detr"])
def test_same_gradients_with_less_that_is_kept(config):
    norm = ("MODEL.RESNETS.NORM", "FrozenBN")
    expected, most = gradients(build([], *norm, config=config))
    for parts in ([part] for part in PARTS):
        got, kept = gradients(build(parts, *norm, config=config))
        assert kept < 0.98 * most, parts
        assert got.keys() == expected.keys()
        for name, grad in got.items():
            assert torch.equal(grad, expected[name]), (parts, name)


def test_names_in_the_state_stay():
    norm = ("MODEL.RESNETS.NORM", "FrozenBN")
    assert list(build(PARTS, *norm).state_dict()) == list(build([], *norm).state_dict())


def test_unknown_part():
    with pytest.raises(UserError, match="names 'encoders'; did you mean encoder"):
        build(["encoders"])


def test_batch_normalisation_that_is_trained():
    with pytest.raises(UserError, match="count each batch twice"):
        build(["backbone"])


def test_backbone_that_is_no_resnet():
    with pytest.raises(UserError, match="is for ResNets, not for"):
        features = ("MODEL.FPN.IN_FEATURES", "['res3', 'res4', 'res5']")
        build(["backbone"], "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", *features)
