"""One step of training in one process: accumulation, mixed precision, scaled losses."""

import copy
import json

from ddetr_d2.data.shapes import SyntheticOptions, draw_image
from ddetr_d2.data.synthetic import make_synthetic
from ddetr_d2.engine.training_step import NotFiniteError, average_counts
from ddetr_d2.modeling import matcher

import pytest
import torch
from detectron2.structures import Boxes, Instances

from ..conftest import MEMBERS, ROOT, TINY
from .steps import INDEPENDENT, build, build_step, copy_of_state, gradients, images


@pytest.mark.parametrize("variant", MEMBERS)
def test_gradients_do_not_depend_on_how_a_batch_is_cut(variant):
    # Float64: rounding must not decide between two equally good matches.
    cfg, model = build(variant, "SOLVER.CLIP_GRADIENTS.ENABLED", "False", "SOLVER.BASE_LR", "0.0")
    step = build_step(cfg, model.double())
    batch = images(2, 0, 3, 1)
    expected_values = step([batch])
    expected = gradients(model)
    assert expected_values["gradient_norm"] > 1
    for micro_batches in ([batch[i : i + 1] for i in range(4)], [batch[:3], batch[3:]]):
        assert step(micro_batches) == pytest.approx(expected_values, rel=1e-9)
        torch.testing.assert_close(gradients(model), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", MEMBERS)
def test_a_batch_without_any_box(variant):
    cfg, model = build(variant)
    step = build_step(cfg, model)
    values = step([images(0, 0), images(0, 0)])
    assert 0 < values["loss_class"] < float("inf")
    assert values["loss_l1"] == values["loss_giou"] == 0
    assert len(gradients(model)) == len([*model.parameters()])


def test_losses_are_divided_by_all_boxes_and_images():
    cpu = torch.device("cpu")
    assert average_counts([images(2, 0), images(3)], 9, cpu) == (5, 5, 3)
    assert average_counts([images(2, 0), images(3)], 2, cpu) == (5, 4, 3)
    assert average_counts([images(0), images(0)], 9, cpu) == (0, 0, 2)


def test_accumulation_by_train_net(train_net, tmp_path):
    make_synthetic(tmp_path / "data", train=4, val=0, min_size=96, max_size=96)
    declared = [["four", str(tmp_path / "data/train.json"), str(tmp_path / "data/train")]]
    lines = []
    for parts in (1, 4):
        folder = tmp_path / str(parts)
        run = train_net(
            "--config-file", str(ROOT / "configs/deformable_detr.yaml"), *TINY, *INDEPENDENT,
            "DATASETS.COCO_FORMAT", repr(declared), "DATASETS.TRAIN", "('four',)",
            "DATASETS.TEST", "()", "INPUT.RANDOM_FLIP", "none", "SEED", "1", "SOLVER.MAX_ITER", "1",
            "SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATE_STEPS", str(parts),
            "OUTPUT_DIR", str(folder),
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        (line,) = (folder / "metrics.json").read_text().splitlines()
        values = json.loads(line)
        lines.append({k: v for k, v in values.items() if "loss" in k or k == "gradient_norm"})
    assert lines[1]["gradient_norm"] > 1
    assert lines[1] == pytest.approx(lines[0], rel=1e-5)


def shapes(count):
    """A batch of synthetic images with one or two objects each."""
    options = SyntheticOptions(min_size=64, max_size=64, max_objects=2)
    batch = images(*[0] * count)
    for number, record in enumerate(batch):
        image, objects = draw_image(options, "train", number)
        record["image"] = torch.from_numpy(image.transpose(2, 0, 1).copy())
        instances = Instances((64, 64))
        instances.gt_boxes = Boxes([x.box for x in objects])
        classes = [x.class_index % 3 for x in objects]
        instances.gt_classes = torch.tensor(classes, dtype=torch.int64)
        record["instances"] = instances
    return batch


def test_bfloat16_learns_as_float32():
    images = shapes(16)
    batches = [images[i : i + 2] for i in range(0, 16, 2)]
    ends = []
    for mixed_precision in (False, True):
        cfg, model = build("deformable_detr_single_scale", "SOLVER.BASE_LR", "0.0002")
        step = build_step(cfg, model, mixed_precision=mixed_precision)
        # Without it the last losses depend on the noise of the last steps.
        decay = torch.optim.lr_scheduler.LinearLR(step.optimizer, 1.0, 0.01, 200)
        losses = []
        for number in range(200):
            values = step([batches[number % 8]])
            decay.step()
            losses.append(sum(x for name, x in values.items() if name.startswith("loss_")))
        ends.append(sum(losses[-24:]) / 24)
        assert ends[-1] < 0.5 * losses[0]  # it has learnt
    assert ends[1] != ends[0]
    assert ends[1] == pytest.approx(ends[0], rel=0.02)


@pytest.mark.parametrize(
    "variant",
    ["deformable_detr", "deformable_detr_refine_two_stage", "detr", "detr_dc5_plus"],
)
def test_boxes_costs_and_losses_are_float32_in_mixed_precision(variant, monkeypatch):
    cfg, model = build(variant)
    found = {"boxes": set(), "costs": set(), "losses": set(), "logits": set()}

    def note(module, inputs, losses):
        layers, proposals, *_ = inputs
        for prediction in [*layers, *([proposals] if proposals else [])]:
            found["boxes"].add(prediction.boxes.dtype)
            found["logits"].add(prediction.logits.dtype)
        found["losses"].update(loss.dtype for loss in losses.values())

    original = matcher.linear_sum_assignment

    def assign(costs):
        found["costs"].add(costs.dtype.name)
        return original(costs)

    monkeypatch.setattr(matcher, "linear_sum_assignment", assign)
    model.criterion.register_forward_hook(note)
    build_step(cfg, model, mixed_precision=True)([images(2, 1)])
    assert found.pop("logits") == {torch.bfloat16}  # so it is mixed precision
    assert found == {"boxes": {torch.float32}, "losses": {torch.float32}, "costs": {"float32"}}


@pytest.fixture
def scaled(monkeypatch):
    """Let the training step scale its losses, as it does on a GPU, beginning with a scale."""
    original = torch.amp.GradScaler

    def begin_with(scale):
        monkeypatch.setattr(
            torch.amp,
            "GradScaler",
            lambda device, enabled: original(device, init_scale=scale, enabled=True),
        )

    return begin_with


def scale_of(step):
    return step.state_dict()["grad_scaler"]["scale"]


def test_scaled_losses_change_nothing(scaled):
    states = []
    for scale in (None, 1024.0):
        cfg, model = build("deformable_detr")
        if scale:
            scaled(scale)
        step = build_step(cfg, model)
        values = [step([images(2, 1)]) for _ in range(2)]
        states.append((values, copy_of_state(model)))
    assert states[1][0] == [pytest.approx(values, rel=1e-5) for values in states[0][0]]
    torch.testing.assert_close(states[1][1], states[0][1], rtol=1e-4, atol=1e-5)


def test_overflow_of_scaled_gradients_is_left_to_the_scale(scaled):
    scaled(2.0**127)
    cfg, model = build("deformable_detr")
    step = build_step(cfg, model)
    before = copy_of_state(model)
    values = step([images(2, 1)])
    assert not torch.tensor(values.pop("gradient_norm")).isfinite()
    assert torch.tensor([*values.values()]).isfinite().all()
    torch.testing.assert_close(copy_of_state(model), before, rtol=0, atol=0)
    assert scale_of(step) == 2.0**126

    scaled(4.0)
    again = build_step(cfg, model)
    again.load_state_dict(copy.deepcopy(step.state_dict()))
    assert scale_of(again) == 2.0**126  # goes on as it was


def test_scaled_losses_that_are_not_finite(scaled):
    scaled(16.0)
    cfg, model = build("deformable_detr")
    step = build_step(cfg, model)
    bad = images(2, 1)
    bad[0]["image"] = torch.full((3, 64, 64), torch.inf)
    before = copy_of_state(model)
    with pytest.raises(NotFiniteError):
        step([bad])
    torch.testing.assert_close(copy_of_state(model), before, rtol=0, atol=0)
    assert scale_of(step) == 8
    assert torch.tensor(step([images(2, 1)])["gradient_norm"]).isfinite()  # the next one works
    name = "transformer.decoder.heads.0.class_embed.weight"
    assert (model.state_dict()[name] != before[name]).all()


def test_gradients_that_no_scale_makes_finite(scaled):
    scaled(4.0)
    cfg, model = build("deformable_detr")
    step = build_step(cfg, model)
    model.projection.level_embed.register_hook(lambda gradient: gradient * torch.nan)
    for _ in range(2):
        step([images(2, 1)])
    assert scale_of(step) == 1
    with pytest.raises(NotFiniteError, match="gradient_norm nan"):
        step([images(2, 1)])
