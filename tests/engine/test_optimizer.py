"""Learning rates of the recipe, and the kinds of clipping."""

from ddetr_d2.engine import Trainer, setup_cfg
from ddetr_d2.engine.optimizer import build_clipping, build_optimizer
from ddetr_d2.engine.training_step import TrainingStep
from ddetr_d2.errors import UserError

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from ..conftest import ROOT, TINY

CONFIG = str(ROOT / "configs" / "deformable_detr.yaml")
OPTIONS = [*TINY, "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3"]


def test_three_learning_rates():
    cfg = setup_cfg(CONFIG, OPTIONS)
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
    assert all(group["weight_decay"] == 1e-4 for group in optimizer.param_groups)


class Sum(nn.Module):
    """A model whose loss has the gradient (3, 4) for one parameter and 12 for the other."""

    num_queries = 1

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.zeros(2))
        self.b = nn.Parameter(torch.zeros(1))

    def forward(self, batch, counts):
        return {"loss": 3 * self.a[0] + 4 * self.a[1] + 12 * self.b.sum()}


@pytest.mark.parametrize(
    ("clip_type", "expected"),
    [
        ("full_model", [3 / 13, 4 / 13, 12 / 13]),
        ("norm", [3 / 5, 4 / 5, 1]),  # of each parameter by itself
        ("value", [1, 1, 1]),
        (None, [3, 4, 12]),
    ],
)
@pytest.mark.parametrize("scale", [None, 8.0])
def test_gradients_are_clipped_without_the_scale_of_the_losses(
    clip_type, expected, scale, monkeypatch
):
    if scale:
        original = torch.amp.GradScaler
        monkeypatch.setattr(
            torch.amp, "GradScaler", lambda device, enabled: original(device, init_scale=scale)
        )
    cfg = setup_cfg(CONFIG, OPTIONS)
    cfg.SOLVER.merge_from_list(["OPTIMIZER", "SGD", "MOMENTUM", 0.0, "WEIGHT_DECAY", 0.0])
    cfg.SOLVER.merge_from_list(["BASE_LR", 1.0, "CLIP_GRADIENTS.CLIP_VALUE", 1.0])
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = clip_type is not None
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = clip_type or "value"
    model = Sum()
    step = TrainingStep(model, build_optimizer(cfg, model), build_clipping(cfg))
    values = step([[]])
    assert values["gradient_norm"] == pytest.approx(13)  # before the clipping
    change = -torch.cat((model.a, model.b)).detach()
    torch.testing.assert_close(change, torch.tensor(expected, dtype=torch.float32))


def test_unknown_optimizer_and_clipping():
    model = nn.Linear(2, 2)
    for key, value in (("SOLVER.OPTIMIZER", "Lion"), ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "foo")):
        cfg = setup_cfg(CONFIG, [*OPTIONS, key, value])
        with pytest.raises(UserError, match=f"{key} is '{value}'; expected one of"):
            build_optimizer(cfg, model)
