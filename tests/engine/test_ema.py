"""The moving average of the weights: computed, evaluated, saved and resumed."""

import json
import re
import shutil

from ddetr_d2.engine.training_step import NotFiniteError

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..conftest import ROOT, TINY
from .steps import build, build_step, copy_of_state, images

DECAY = 0.75


def averaged(states):
    """The average by hand: the weights after the first step, then a recursion."""
    average = states[0]
    for state in states[1:]:
        average = {
            name: DECAY * average[name] + (1 - DECAY) * tensor
            for name, tensor in state.items()
            if tensor.is_floating_point()
        }
    return average


def assert_is_average(average, states):
    for name, expected in averaged(states).items():
        torch.testing.assert_close(average[name], expected, rtol=1e-5, atol=1e-6)


def test_every_step_that_is_made_counts():
    cfg, model = build("deformable_detr", "MODEL.RESNETS.NORM", "BN", "SOLVER.BASE_LR", "0.01")
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)
    step = build_step(cfg, model, ema=ema)
    states = []
    for boxes in ((2, 1), (0, 3), (1, 1)):
        step([images(*boxes)])
        states.append(copy_of_state(model))
        before = copy_of_state(ema.module)
        bad = images(*boxes)
        bad[0]["image"] = torch.full((3, 64, 64), torch.nan)
        with pytest.raises(NotFiniteError):
            step([bad])
        torch.testing.assert_close(copy_of_state(ema.module), before, rtol=0, atol=0)
    assert_is_average(ema.module.state_dict(), states)
    assert not ema.module.projection.level_embed.equal(model.projection.level_embed)


@pytest.fixture(scope="module")
def options(shapes_opts):
    return [
        "--config-file", str(ROOT / "configs" / "deformable_detr.yaml"), *TINY, *shapes_opts,
        "SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.DECAY", str(DECAY), "SEED", "2",
        "SOLVER.BASE_LR", "0.01", "SOLVER.MAX_ITER", "3", "SOLVER.CHECKPOINT_PERIOD", "1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(train_net, options, tmp_path_factory):
    """Folder of a run of three steps, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("ema")
    run = train_net(*options, "OUTPUT_DIR", str(folder))
    assert run.returncode == 0, run.stderr
    return folder


def checkpoint(folder, name):
    return torch.load(folder / f"{name}.pth", weights_only=True)


def average_in(content):
    state = content["trainer"]["_trainer"]["ema"]
    return {k.removeprefix("module."): v for k, v in state.items() if k.startswith("module.")}


def test_saved_beside_the_weights(trained):
    contents = [checkpoint(trained, f"model_{i:07d}") for i in range(3)]
    assert_is_average(average_in(contents[2]), [content["model"] for content in contents])
    final = checkpoint(trained, "model_final_ema")
    assert final["class_names"] == contents[2]["class_names"]
    torch.testing.assert_close(
        dict(final["model"]), average_in(checkpoint(trained, "model_final")), rtol=0, atol=0
    )
    assert (trained / "last_checkpoint").read_text() == "model_final.pth"


def test_evaluated_beside_the_weights(trained, train_net, options, tmp_path):
    lines = [json.loads(line) for line in (trained / "metrics.json").read_text().splitlines()]
    assert {"bbox/AP", "ema/bbox/AP"} < set(lines[-1])
    evaluated = {}
    for name in ("model_final", "model_final_ema"):
        folder = tmp_path / name
        run = train_net(
            "--eval-only", *options, "MODEL.WEIGHTS", str(trained / f"{name}.pth"),
            "OUTPUT_DIR", str(folder),
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        evaluated[name] = scores(next(folder.glob("inference/*/coco_instances_results.json")))
    (raw,) = trained.glob("inference/*/coco_instances_results.json")
    (averaged,) = trained.glob("inference_ema/*/coco_instances_results.json")
    assert scores(raw) == pytest.approx(evaluated["model_final"], rel=1e-3)
    assert scores(averaged) == pytest.approx(evaluated["model_final_ema"], rel=1e-3)
    assert scores(averaged) != pytest.approx(evaluated["model_final"], rel=1e-3)


def scores(file):
    return sorted(x["score"] for x in json.loads(file.read_text()))


def test_resumed_exactly(trained, train_net, options, tmp_path):
    folder = tmp_path / "resumed"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("model_*[12].pth", "model_f*"))
    (folder / "last_checkpoint").write_text("model_0000000.pth")
    run = train_net("--resume", *options, "OUTPUT_DIR", str(folder))
    assert run.returncode == 0, run.stderr
    assert re.search("Starting training from iteration 1$", run.stdout, re.MULTILINE)
    for name in ("model_0000002", "model_final"):
        ends = [
            checkpoint(where, name)["trainer"]["_trainer"]["ema"] for where in (trained, folder)
        ]
        torch.testing.assert_close(dict(ends[1]), dict(ends[0]), rtol=0, atol=0)
        assert ends[0]["n_averaged"] == 3


def test_switched_on_later_it_begins_with_the_weights_of_then(
    trained, train_net, shapes_opts, options, tmp_path
):
    off = ["SOLVER.EMA.ENABLED", "False", "OUTPUT_DIR", str(tmp_path)]
    first = train_net(*options, *off, "SOLVER.MAX_ITER", "1")
    assert first.returncode == 0, first.stderr
    assert not (tmp_path / "model_final_ema.pth").exists()
    resumed = train_net("--resume", *options, "OUTPUT_DIR", str(tmp_path))
    assert resumed.returncode == 0, resumed.stderr
    states = [checkpoint(tmp_path, f"model_{i:07d}")["model"] for i in (1, 2)]
    assert_is_average(checkpoint(tmp_path, "model_final_ema")["model"], states)
