"""Training and evaluation by two processes: the same as by one."""

import json
import re
import shutil

from ddetr_d2.data.synthetic import make_synthetic
from ddetr_d2.engine.heartbeat import EXIT_HUNG

import pytest
import torch

from ..conftest import MEMBERS, ROOT, TINY
from ..programs import run_program
from .two_processes import two_steps

TWO_PROCESSES = ROOT / "tests" / "engine" / "two_processes.py"


@pytest.fixture(scope="module")
def by_two(tmp_path_factory):
    """Losses and gradients of two steps, by process."""
    folder = tmp_path_factory.mktemp("steps")
    run = run_program(TWO_PROCESSES, "steps", str(folder))
    assert run.returncode == 0, run.stderr
    assert "unused" not in run.stderr  # DistributedDataParallel warns of a needless search
    return [torch.load(folder / f"{rank}.pth", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", [*MEMBERS, "accumulated"])
def test_losses_and_gradients_are_those_of_one_process(by_two, case):
    expected = two_steps(MEMBERS[0] if case == "accumulated" else case)
    assert expected[0][0]["loss_l1"] != expected[1][0]["loss_l1"]
    for results in by_two:
        for (values, got), (wanted_values, wanted) in zip(results[case], expected, strict=True):
            assert values == pytest.approx(wanted_values, rel=1e-9)
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Of a training with statistics of batch normalisation, evaluated on three images."""
    folder = tmp_path_factory.mktemp("data")
    make_synthetic(folder, train=4, val=3)
    declared = [[f"few_{s}", str(folder / f"{s}.json"), str(folder / s)] for s in ("train", "val")]
    return [
        "--config-file", str(ROOT / "configs" / "deformable_detr.yaml"), *TINY,
        "DATASETS.COCO_FORMAT", repr(declared), "DATASETS.TRAIN", "('few_train',)",
        "DATASETS.TEST", "('few_val',)", "SOLVER.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", "1",
        "SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.DECAY", "0.5", "SOLVER.IMS_PER_BATCH", "4",
        "SEED", "5",
    ]  # fmt: skip


def metrics(folder):
    """Lines of ``metrics.json`` without what depends on the time."""
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    times = ("time", "data_time", "rank_data_time", "eta_seconds")
    return [{k: v for k, v in line.items() if k not in times} for line in lines]


def detections(folder, evaluation="inference"):
    (file,) = folder.glob(f"{evaluation}/*/coco_instances_results.json")
    found = json.loads(file.read_text())
    return sorted(found, key=lambda x: (x["image_id"], x["score"], x["category_id"], x["bbox"]))


def train_by_two(*arguments):
    """Run train_net.py by two processes; returns what it has printed."""
    run = run_program(TWO_PROCESSES, "train", *arguments)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory):
    """Output and folder of two processes' two steps."""
    folder = tmp_path_factory.mktemp("two")
    return train_by_two(*options, "OUTPUT_DIR", str(folder)), folder


def test_one_process_writes(trained):
    output, folder = trained
    assert output.count("Saving checkpoint to") == 4
    assert {path.name for path in folder.glob("*.pth")} == {
        "model_0000000.pth", "model_0000001.pth", "model_final.pth", "model_final_ema.pth",
    }  # fmt: skip
    assert [line["iteration"] for line in metrics(folder)] == [1, 2]
    assert output.count("Starting training from iteration 0") == 1


def test_evaluation_counts_every_image_once(trained, train_net, options, tmp_path):
    results = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        arguments = [
            "--eval-only", *options, "MODEL.WEIGHTS", str(trained[1] / "model_final.pth"),
            "OUTPUT_DIR", str(out),
        ]  # fmt: skip
        if processes == 2:
            output = train_by_two(*arguments)
        else:
            output = train_net(*arguments).stdout
        results.append((detections(out), re.findall(r"copypaste: ([\d.]+,.*)", output)))
    (alone, ap_alone), (together, ap_together) = results
    assert {x["image_id"] for x in alone} == {1, 2, 3}
    assert together == alone
    assert ap_together == ap_alone and len(ap_alone) == 1


@pytest.fixture
def interrupted(trained, tmp_path):
    """The folder as it was when the first of the two steps had been saved."""
    folder = tmp_path / "interrupted"
    shutil.copytree(trained[1], folder, ignore=shutil.ignore_patterns("model_*1.pth", "model_f*"))
    (folder / "last_checkpoint").write_text("model_0000000.pth")
    return folder


@pytest.mark.parametrize("ema", [True, False])
def test_every_process_evaluates_the_same_model(ema, trained, train_net, options, tmp_path):
    """Batches that a process has seen alone have no part in the statistics that it evaluates."""
    folder = trained[1]
    weights = folder / ("model_final_ema.pth" if ema else "model_final.pth")
    run = train_net(
        "--eval-only", *options, "MODEL.WEIGHTS", str(weights), "OUTPUT_DIR", str(tmp_path / "1")
    )
    assert run.returncode == 0, run.stderr
    together = detections(folder, "inference_ema" if ema else "inference")
    alone = detections(tmp_path / "1")
    assert len(together) == len(alone)
    for image in (1, 2, 3):
        scores, expected = (
            sorted(x["score"] for x in found if x["image_id"] == image)
            for found in (together, alone)
        )
        assert scores == pytest.approx(expected, rel=1e-4), image


def test_resumed_by_as_many_processes(trained, options, interrupted):
    output = train_by_two("--resume", *options, "OUTPUT_DIR", str(interrupted))
    assert "Starting training from iteration 1" in output
    assert "goes on with" not in output.replace("goes on with its seed", "")
    ends = [
        torch.load(folder / "model_final.pth", weights_only=True)
        for folder in (trained[1], interrupted)
    ]
    for part in ("model", "trainer", "iteration"):
        torch.testing.assert_close(ends[1][part], ends[0][part], rtol=0, atol=0)
    assert {"optimizer", "ema"} < set(ends[0]["trainer"]["_trainer"])
    for rank in range(2):
        states = [end["run"]["random_states"][rank]["torch"] for end in ends]
        assert states[0].equal(states[1])
    assert metrics(interrupted) == metrics(trained[1])


def test_resumed_by_another_number_of_processes(train_net, options, interrupted):
    run = train_net("--resume", *options, "OUTPUT_DIR", str(interrupted))
    assert run.returncode == 0, run.stderr
    assert "started with 2 processes and goes on with 1: its images are the same" in run.stdout
    assert torch.load(interrupted / "model_final.pth", weights_only=True)["iteration"] == 1


def test_a_process_that_hangs_in_an_evaluation_ends_the_run(options, tmp_path):
    run = run_program(
        TWO_PROCESSES, "hanging_evaluation", "--hang-limit", "3", *options, "SOLVER.KEEP_BEST",
        "True", "OUTPUT_DIR", str(tmp_path),
    )  # fmt: skip
    assert run.returncode == EXIT_HUNG, run.stderr
    assert "error: rank 1 of 2 hangs: no progress in an evaluation for" in run.stderr
    assert "rank 1 stands at:" in run.stderr and "in hang" in run.stderr
    assert (tmp_path / "model_final.pth").exists()  # the checkpoint comes first
