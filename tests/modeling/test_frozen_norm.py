"""Convolutions whose weights frozen batch normalisation scales."""

from ddetr_d2.engine import setup_cfg
from ddetr_d2.modeling import prepare_for_inference
from ddetr_d2.modeling.frozen_norm import FrozenNormConv2d, scale_weights_by_frozen_norms

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from torch import nn

from ..conftest import ROOT, TINY


def make(bias=False, activation=None):
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(6)
    for name, buffer in norm.named_buffers():
        buffer.copy_(torch.rand(6) + 0.5 if name in ("weight", "running_var") else torch.randn(6))
    options = {"stride": 2, "padding": 1, "groups": 2, "bias": bias}
    return nn.Sequential(Conv2d(4, 6, 3, **options, norm=norm, activation=activation))


@pytest.mark.parametrize("activation", [None, torch.relu])
@pytest.mark.parametrize("bias", [False, True])
def test_same_output_gradients_and_names(bias, activation):
    model = make(bias, activation).double()
    x = torch.randn(2, 4, 9, 11, dtype=torch.float64, requires_grad=True)
    names = list(model.state_dict())
    expected = [model(x), *torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])]
    scale_weights_by_frozen_norms(model)
    assert isinstance(model[0], FrozenNormConv2d)
    got = [model(x), *torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()])]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("stride", [1, 2])
def test_pointwise(stride):
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(6)
    norm.weight.copy_(torch.rand(6) + 0.5)
    norm.bias.copy_(torch.randn(6))
    model = nn.Sequential(Conv2d(4, 6, 1, stride=stride, bias=False, norm=norm))
    x = torch.randn(2, 4, 32, 20).to(memory_format=torch.channels_last).requires_grad_()
    results = []
    for change in (lambda model: None, scale_weights_by_frozen_norms):
        change(model)
        loss = model(x).square().sum()
        results.append([model(x), *torch.autograd.grad(loss, [x, *model.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_norm_that_learns_is_left_alone():
    model = nn.Sequential(Conv2d(4, 6, 3, norm=nn.BatchNorm2d(6)), Conv2d(6, 6, 3))
    before = list(model)
    scale_weights_by_frozen_norms(model)
    assert list(model) == before


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="there is no oneDNN")
def test_packed_for_inference():
    opts = [*TINY, "MODEL.RESNETS.NORM", "FrozenBN", "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3"]
    model = build_model(setup_cfg(str(ROOT / "configs" / "deformable_detr.yaml"), opts)).eval()
    prepared = prepare_for_inference(model).backbone
    assert not any(isinstance(module, Conv2d) for module in prepared.modules())
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        expected, got = model.backbone(x)["res5"], prepared(x)["res5"]
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
