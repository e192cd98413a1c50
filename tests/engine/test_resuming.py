"""A run that is killed or stopped, and resumed, is the run that was not interrupted."""

import json
import os
import random
import signal
import time

from ddetr_d2.checkpoint.whole_files import PARTIAL

import pytest
import torch

from ..conftest import ROOT, TINY
from ..programs import Program

STEPS = 80
TIMES = {"time", "data_time", "eta_seconds", "rank_data_time"}
SCRIPT = ROOT / "train_net.py"


@pytest.fixture(scope="module")
def options(shapes_opts):
    """A training with dropout, augmentation, batch norm, a moving average and evaluations."""
    return [
        *("--config-file", str(ROOT / "configs" / "deformable_detr_refine_two_stage.yaml")),
        *TINY,
        *shapes_opts,
        *("INPUT.MIN_SIZE_TRAIN", "(48, 64)", "INPUT.MIN_SIZE_TEST", "48"),
        *("SOLVER.MAX_ITER", str(STEPS), "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.STEPS", "(30,)"),
        *("SOLVER.CHECKPOINTS_KEPT", "2", "SOLVER.KEEP_BEST", "True", "TEST.EVAL_PERIOD", "16"),
        *("SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.DECAY", "0.9"),
        *("DATALOADER.ASPECT_RATIO_GROUPING", "True", "SEED", "7"),
    ]


def start(options, out, *more):
    return Program(SCRIPT, *options, *more, "OUTPUT_DIR", str(out))


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    run = start(options, out).wait()
    assert run.returncode == 0, run.stderr
    return out


def metrics_of(out):
    lines = (out / "metrics.json").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def assert_equal(a, b, where="checkpoint"):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - TIMES - {"metrics_bytes"}:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}.{index}")
    else:
        assert a == b or (a != a and b != b), where


def assert_same_run(out, other):
    """Weights, optimiser, moving average, generators and figures agree to the last bit."""
    assert metrics_of(out) == metrics_of(other)
    for name in ("model_final.pth", "model_final_ema.pth", "model_best.pth"):
        assert (out / name).exists() == (other / name).exists(), name
        if (out / name).exists():
            a, b = (torch.load(folder / name, weights_only=True) for folder in (out, other))
            for content in (a, b):  # names of files, and how the program was called
                content.pop("periodic_checkpoints"), content.pop("config")
            assert_equal(a, b, name)


def kill_at_some_moment(program, out, kind, chance):
    """Kill a run: at its start, after a checkpoint, or while one is being written."""
    known = set(out.iterdir())

    def reached():
        new = set(out.iterdir()) - known
        if kind == 0:
            return bool(new)
        end = PARTIAL if kind == 1 else ".pth"
        return any(path.name.endswith(end) for path in new)

    while program.process.is_alive() and not reached():
        time.sleep(0.0005)
    time.sleep((chance.uniform(0, 0.5), 0, chance.uniform(0, 0.1))[kind])
    program.process.kill()


def test_killed_at_twenty_moments(options, undisturbed, tmp_path):
    """SIGKILL at any time, the writing of checkpoints included, with changing data workers."""
    chance = random.Random(0)
    for attempt in range(20):
        workers = ["DATALOADER.NUM_WORKERS", str(attempt % 3)]
        program = start(["--resume", *options], tmp_path, *workers)
        kill_at_some_moment(program, tmp_path, chance.randrange(3) if attempt else 2, chance)
        run = program.wait()
        assert run.returncode == -signal.SIGKILL, run.stdout + run.stderr
        for path in tmp_path.glob("model_*.pth"):
            torch.load(path, weights_only=True)
    assert not (tmp_path / "model_final.pth").exists(), "the run was too short for twenty kills"
    run = start(["--resume", *options], tmp_path).wait()
    assert run.returncode == 0, run.stderr
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal(number, options, undisturbed, tmp_path):
    program = start(options, tmp_path)
    program.wait_for(tmp_path / "model_0000003.pth")
    os.kill(program.process.pid, number)
    run = program.wait()
    assert run.returncode == 75, run.stderr
    assert f"Stopped by {number.name}; continue with --resume" in run.stdout
    run = start(["--resume", *options], tmp_path).wait()
    assert run.returncode == 0, run.stderr
    assert_same_run(tmp_path, undisturbed)


def test_time_limit(options, tmp_path):
    run = start(options, tmp_path, "SOLVER.MAX_HOURS", "1e-9").wait()
    assert run.returncode == 75
    assert "Stopped by SOLVER.MAX_HOURS 1e-09" in run.stdout
    assert (tmp_path / "model_0000000.pth").exists()


def test_a_finished_run_stays_as_it_is(options, undisturbed):
    before = metrics_of(undisturbed)
    run = start(["--resume", *options], undisturbed).wait()
    assert run.returncode == 0, run.stderr
    assert metrics_of(undisturbed) == before


def test_the_seed_makes_the_run(options, undisturbed, tmp_path):
    opts = options[:-2]  # without SEED
    first = start(opts, tmp_path / "a", "SOLVER.MAX_ITER", "2").wait()
    second = start(opts, tmp_path / "b", "SOLVER.MAX_ITER", "2").wait()
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    a, b = (torch.load(tmp_path / x / "model_final.pth", weights_only=True) for x in "ab")
    name = "projection.level_embed"
    assert not torch.equal(a["model"][name], b["model"][name])
    seed = a["run"]["loader"]["seed"]
    assert f"SEED: {seed}" in (tmp_path / "a" / "config.yaml").read_text()
    resumed = start(["--resume", *opts], tmp_path / "a", "SOLVER.MAX_ITER", "4").wait()
    assert resumed.returncode == 0, resumed.stderr
    again = start(opts, tmp_path / "c", "SOLVER.MAX_ITER", "4", "SEED", str(seed)).wait()
    assert again.returncode == 0, again.stderr
    c, d = (torch.load(tmp_path / x / "model_final.pth", weights_only=True) for x in "ac")
    assert_equal(c["model"], d["model"])
