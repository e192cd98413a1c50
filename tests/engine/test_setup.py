"""Mistakes in configuration files and options: one message each."""

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from ddetr_d2.engine import Trainer, setup_cfg
from ddetr_d2.errors import UserError

from ..conftest import ROOT, TINY

CONFIG = str(ROOT / "configs" / "deformable_detr.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("MODEL: 5", "MODEL"),
        ("_BASE_: missing.yaml", "missing.yaml"),
        ("_BASE_: config.yaml", "no Detectron2 configuration"),
        ("MODEL:\n  META_ARCHITECTURE: GeneralizedRCNN", "GeneralizedRCNN"),
        ("SOLVER:\n  BASE_LR: [1]", "BASE_LR"),
    ],
)
def test_bad_files(content, message, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        setup_cfg(str(path))


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE is 'gpu'"),
        (["MODEL.WEIGHTS", "x.pth", "--eval-only"], "--eval-only comes too late"),
        (["MODEL.RESNET.DEPTH", "50"], "did you mean MODEL.RESNETS.DEPTH"),
    ],
)
def test_bad_options(opts, message):
    with pytest.raises(UserError, match=message):
        setup_cfg(CONFIG, opts)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.RESNETS.OUT_FEATURES", "['res5']"], "IN_FEATURES names res3, res4"),
        (["MODEL.DEFORMABLE_DETR.NUM_FEATURE_LEVELS", "2"], "NUM_FEATURE_LEVELS is 2"),
        (["MODEL.DEFORMABLE_DETR.HIDDEN_DIM", "100"], "multiple of 32"),
        (["MODEL.DEFORMABLE_DETR.NUM_HEADS", "7"], "multiple of 7"),
    ],
)
def test_sizes_that_do_not_go_together(opts, message):
    cfg = setup_cfg(CONFIG, [*TINY, "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3", *opts])
    with pytest.raises(UserError, match=message):
        build_model(cfg)


def test_three_learning_rates_and_clipping_of_the_total_norm():
    cfg = setup_cfg(CONFIG, [*TINY, "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3"])
    model = build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if name.startswith("backbone."):
            expected = 2e-5
        elif "sampling_offsets" in name or "reference_points" in name:
            expected = 2e-5
        else:
            expected = 2e-4
        assert rates[parameter] == pytest.approx(expected), name
        parameter.grad = parameter.detach().clone().fill_(1.0)
    assert all(group["weight_decay"] == 1e-4 for group in optimizer.param_groups)
    optimizer.step()
    total = sum(p.grad.square().sum() for p in model.parameters()).sqrt()
    assert total.item() == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("clip_type", ["full_model", "norm", "none"])
def test_scaled_losses_of_mixed_precision_change_nothing(clip_type):
    opts = [*TINY, "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3"]
    opts += ["SOLVER.CLIP_GRADIENTS.ENABLED", str(clip_type != "none")]
    if clip_type != "none":
        opts += ["SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip_type]
    results = []
    for amp in (False, True):
        cfg = setup_cfg(CONFIG, [*opts, "SOLVER.AMP.ENABLED", str(amp)])
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
        optimizer = Trainer.build_optimizer(cfg, model)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=amp)
        inputs = torch.randn(3, 5, 3, dtype=torch.double)
        inputs[1] = torch.inf  # of these gradients nothing is learnt
        for x in inputs if amp else inputs[::2]:
            optimizer.zero_grad()
            scaler.scale(model(x).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update(1024.0)
        results.append([*model.parameters()])
    for expected, got in zip(*results, strict=True):
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected)


def test_unknown_optimizer_and_clipping():
    opts = [*TINY, "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3"]
    model = build_model(setup_cfg(CONFIG, opts))
    for key, value in (("SOLVER.OPTIMIZER", "Lion"), ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "foo")):
        with pytest.raises(UserError, match=f"{key} is '{value}'"):
            Trainer.build_optimizer(setup_cfg(CONFIG, [*opts, key, value]), model)
