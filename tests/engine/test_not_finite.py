"""Losses and gradients that are not finite: left out or stopped for, and explained."""

import itertools
import logging

from ddetr_d2.data import infer_num_classes, register_datasets
from ddetr_d2.engine import setup_cfg
from ddetr_d2.engine.not_finite import find_bad_module
from ddetr_d2.engine.trainer import Trainer
from ddetr_d2.engine.training_step import NotFiniteError, TrainingStep
from ddetr_d2.errors import UserError

import pytest
import torch

from ..conftest import ROOT, TINY
from ..programs import run_program
from .steps import build, build_step, copy_of_state, images


def spoil_weights(model, batch):
    with torch.no_grad():
        model.transformer.decoder.layers[1].ffn.linear1.weight[3, 4] = torch.inf


def spoil_image(model, batch):
    batch[1]["image"] = torch.full((3, 64, 64), torch.nan)


def spoil_activation(model, batch):
    layer = model.transformer.decoder.layers[0]
    layer.ffn.linear2.register_forward_hook(lambda module, inputs, output: output / 0)


def spoil_loss(model, batch):
    batch[0]["instances"].gt_boxes.tensor[1, 2] = torch.nan


def spoil_gradient(model, batch):
    def hook(module, inputs, output):
        output.register_hook(lambda gradient: gradient * torch.nan)

    model.transformer.encoder.layers[0].ffn.linear2.register_forward_hook(hook)


@pytest.mark.parametrize(
    ("spoil", "where"),
    [
        (spoil_weights, "the weights of transformer.decoder.layers.1.ffn.linear1.weight"),
        (spoil_image, "the output of backbone.stem.conv1"),
        (spoil_activation, "the output of transformer.decoder.layers.0.ffn.linear2"),
        (spoil_loss, "the output of criterion"),
        (spoil_gradient, "the gradient of transformer.encoder.layers.0.ffn.linear2"),
    ],
)
def test_nothing_changes_and_the_first_bad_place_is_found(spoil, where):
    cfg, model = build("deformable_detr", "MODEL.RESNETS.NORM", "BN")
    step = build_step(cfg, model)
    batch = images(2, 0, 1)
    step([images(1, 1)])
    spoil(model, batch)
    model_before = copy_of_state(model)
    optimizer_before = {
        p: {k: v.clone() for k, v in state.items()} for p, state in step.optimizer.state.items()
    }
    with pytest.raises(NotFiniteError) as error:
        step([batch[:2], batch[2:]])
    assert not torch.tensor([*error.value.values.values()]).isfinite().all()
    assert find_bad_module(step, [batch[:2], batch[2:]]).text.startswith(where)
    assert not any(module._forward_hooks for module in model.backbone.modules())
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, model_before[name], rtol=0, atol=0)
    for parameter, state in step.optimizer.state.items():
        for key, value in state.items():
            assert value.equal(optimizer_before[parameter][key])


CONFIG = ["--config-file", str(ROOT / "configs" / "deformable_detr.yaml")]


def messages(run):
    """Lines of a finished program that report what a user can mend."""
    assert "Traceback" not in run.stdout + run.stderr
    return [line for line in run.stderr.splitlines() if line.startswith("error: ")]


def test_a_run_that_diverges_stops_with_what_it_had(train_net, shapes_opts, tmp_path, capsys):
    run = train_net(
        *CONFIG, *TINY, *shapes_opts, "SOLVER.BASE_LR", "1e30", "SOLVER.CLIP_GRADIENTS.ENABLED",
        "False", "SOLVER.MAX_ITER", "5", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATE_STEPS",
        "2", "OUTPUT_DIR", str(tmp_path),
    )  # fmt: skip
    assert run.returncode == 2
    (message,) = messages(run)
    (file,) = tmp_path.glob("not_finite_*.pth")
    assert str(file) in message and "SOLVER.BASE_LR" in message
    content = torch.load(file, weights_only=True)
    assert f"iteration {content['iteration']} " in message
    assert [len(batch) for batch in content["batch"]] == [2, 2]
    for batch in content["batch"]:
        for record in batch:
            assert record["file_name"] in message
    kept = torch.load(tmp_path / f"model_{content['iteration'] - 1:07d}.pth", weights_only=True)
    assert kept["iteration"] == content["iteration"] - 1
    for name, tensor in kept["model"].items():
        torch.testing.assert_close(tensor, content["model"][name], rtol=0, atol=0)


@pytest.fixture
def trainer(shapes_opts, tmp_path):
    """A trainer of the tiny model that may leave out two steps in a row."""
    cfg = setup_cfg(CONFIG[1], [*TINY, *shapes_opts, "SOLVER.MAX_SKIPPED_STEPS", "2"])
    cfg.merge_from_list(["DATASETS.TEST", (), "SEED", 0, "OUTPUT_DIR", str(tmp_path)])
    cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES = infer_num_classes(cfg, register_datasets(cfg))
    return Trainer(cfg)


def fail_in(monkeypatch, trainer, steps):
    """Let some of the training's steps fail; returns the weights before and after each step."""
    original = TrainingStep.__call__
    weights = []

    def step(self, micro_batches):
        weights.append(copy_of_state(self.model))
        if trainer.iter in steps:
            raise NotFiniteError({"loss_class": float("nan")})
        return original(self, micro_batches)

    monkeypatch.setattr(TrainingStep, "__call__", step)
    return weights


def test_steps_may_be_left_out(monkeypatch, trainer, caplog):
    trainer.max_iter = 6
    weights = fail_in(monkeypatch, trainer, {0, 1, 3, 4})
    with caplog.at_level(logging.WARNING):
        trainer.train()
    left_out = [r.getMessage() for r in caplog.records if "is left out" in r.getMessage()]
    assert [int(text.split()[1]) for text in left_out] == [0, 1, 3, 4]
    assert all("loss_class nan" in text for text in left_out)
    changed = [
        any(not tensor.equal(after[name]) for name, tensor in before.items())
        for before, after in itertools.pairwise(weights)
    ]
    assert changed == [False, False, True, False, False]


def test_too_many_steps_in_a_row(monkeypatch, trainer, tmp_path):
    trainer.max_iter = 6
    weights = fail_in(monkeypatch, trainer, {1, 2, 3})
    with pytest.raises(UserError, match="iteration 3 gives numbers that are not finite"):
        trainer.train()
    assert len(weights) == 4
    kept = torch.load(tmp_path / "model_0000002.pth", weights_only=True)
    torch.testing.assert_close(kept["model"], weights[-1], rtol=0, atol=0)


def stopped_run_of_two(trainer, options, folder):
    """Message and written step of a run by two processes, each with two micro-batches of one."""
    run = run_program(
        ROOT / "tests" / "engine" / "two_processes.py", trainer, *CONFIG, *TINY, *options,
        "SOLVER.MAX_ITER", "5", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.ACCUMULATE_STEPS", "2",
        "SEED", "3", "OUTPUT_DIR", str(folder),
    )  # fmt: skip
    assert run.returncode == 2, run.stderr
    (message,) = messages(run)
    (file,) = folder.glob("not_finite_*.pth")
    assert str(file) in message
    content = torch.load(file, weights_only=True)
    assert [len(batch) for batch in content["batch"]] == [1, 1, 1, 1]
    names = [batch[0]["file_name"] for batch in content["batch"]]
    assert len(set(names)) == 4 and ", ".join(names) in message
    return message, file, content


def test_two_processes_give_one_report(shapes_opts, tmp_path, replay_step, capsys):
    message, file, content = stopped_run_of_two("nan_image", shapes_opts, tmp_path)
    assert message.startswith(
        "error: training has diverged: iteration 1 gives numbers that are not finite, first in the "
        "output of backbone.stem.conv1.norm of rank 1, for the images "
    )
    finite = [bool(batch[0]["image"].isfinite().all()) for batch in content["batch"]]
    assert finite == [True, True, True, False]
    assert (tmp_path / "model_0000000.pth").exists()
    assert replay_step([str(file)]) == 1
    assert "The first bad value: the output of backbone.stem.conv1.norm." in capsys.readouterr().out


def test_one_process_repeats_the_step_of_two(shapes_opts, tmp_path, replay_step, capsys):
    """Dropout included: each process has random numbers of its own."""
    message, file, content = stopped_run_of_two("nan_gradient", shapes_opts, tmp_path)
    assert "the gradient of transformer.encoder.layers.0.ffn.linear2.bias of rank 1, for" in message
    states = [state["torch"] for state in content["random_states"]]
    assert len(states) == 2 and not states[0].equal(states[1])
    assert replay_step([str(file)]) == 0  # what made the gradient bad is not in the file
    losses = {name: value for name, value in content["values"].items() if "loss" in name}
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if "loss_" in line]
    assert {name: float(now) for name, _, now in printed} == pytest.approx(losses, rel=1e-4)
