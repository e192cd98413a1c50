"""tools/benchmark_op.py and tools/benchmark_model.py: what they report, at small sizes."""

import importlib
import json
import subprocess
import sys

import pytest
import torch

from ddetr_d2.errors import UserError

from ..conftest import ROOT, TINY

SIZE = ["--image-size", "64", "96"]
# A model that transformers has as well.
SMALL = [*TINY, *("MODEL.RESNETS.NORM", "FrozenBN"), *("MODEL.RESNETS.STEM_OUT_CHANNELS", "64")]


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a program here, on the CPU and with a single turn; returns what it wrote."""
    monkeypatch.syspath_prepend(ROOT / "tools")

    def run(program, *arguments):
        path = tmp_path / "report.json"
        common = ["--device", "cpu", "--repetitions", "1", "--json", str(path)]
        importlib.import_module(program).main([*common, *arguments])
        return json.loads(path.read_text())

    return run


def test_operator(run, capsys):
    options = ["--workloads", "decoder", "--batch", "1", "--parts", "time"]
    report = run("benchmark_op", *options, *SIZE)
    assert report["bandwidth_gb_per_s"] > 0
    records = report["time"]
    cases = {(x["type"], x["pass"], x["implementation"]) for x in records}
    for direction in ("forward", "forward + backward"):
        for name in ("ddetr_d2", "grid_sample", "reference"):
            assert ("float32", direction, name) in cases
        assert ("bfloat16", direction, "ddetr_d2") in cases
    for record in records:
        assert 0 < record["fastest_ms"] <= record["median_ms"]
        assert record["speedup"] > 0 and record["bandwidth_share"] > 0
        assert record["error"] < (1e-5 if record["type"] == "float32" else 1e-1)
        if record["implementation"] == "grid_sample":
            assert record["speedup"] == 1
    rows = [x for x in capsys.readouterr().out.splitlines() if x.startswith("| decoder")]
    assert len(rows) == len(records)


def test_wrong_results_are_not_timed(run, monkeypatch, capsys):
    program = importlib.import_module("benchmark_op")
    right = program.IMPLEMENTATIONS["reference"]
    doubled = {"grid_sample": lambda case: lambda *inputs: 2 * right(case)(*inputs)}
    monkeypatch.setattr(program, "IMPLEMENTATIONS", program.IMPLEMENTATIONS | doubled)
    small = ["--parts", "time", "--workloads", "decoder", "--types", "float32", *SIZE]
    report = run("benchmark_op", "--batch", "1", *small)
    assert {x["implementation"] for x in report["time"]} == {"ddetr_d2", "reference"}
    assert "grid_sample is left out of decoder, batch 1, float32" in capsys.readouterr().err


def test_memory_of_the_operator(run):
    (record,) = run(
        "benchmark_op",
        *("--image-size", "200", "266", "--parts", "memory", "--workloads", "encoder"),
        *("--batch", "1", "--types", "float32", "--implementations", "ddetr_d2"),
    )["memory"]
    # The gradients at least, which have to be somewhere.
    assert 0.9 < record["extra_per_gradients"] < 2
    assert record["extra_mb"] > 2


def test_model(run, capsys, monkeypatch):
    def here(make, *arguments):
        assert make(*arguments)()
        return 5_000_000, 20_000_000

    # Processes of their own, which take long to start, are left to the other tests.
    monkeypatch.setattr(importlib.import_module("benchmark_model"), "peak_memory", here)
    report = run(
        "benchmark_model",
        *SIZE,
        *("--sides", "64", "96", "128", "--training-batch", "1"),
        *("--parts", "inference", "breakdown", "memory", "scaling", "training"),
        *("--opts", *SMALL),
    )
    assert report["difference"] < 1e-4
    assert [x["implementation"] for x in report["inference"]] == ["ddetr_d2", "transformers"]
    assert report["inference"][0]["images_per_second"] > 0
    parts = {x["part"]: x["ms"] for x in report["breakdown"]}
    assert {"backbone", "encoder", "decoder and heads", "rest"} < parts.keys()
    assert sum(parts.values()) == pytest.approx(2 * parts["total"], rel=0.01)
    assert len(report["operators"]) == 15
    assert report["memory"] == [
        {"implementation": name, "extra_mb": 5, "peak_mb": 20, "ratio": 1}
        for name in ("transformers", "ddetr_d2")
    ]
    sizes = [(x["height"], x["width"]) for x in report["scaling"]]
    assert sizes == [(64, 96), (96, 144), (128, 192)]
    assert isinstance(report["exponent"], float)
    kinds = {(x["amp"], x["layout"]) for x in report["training"]}
    assert kinds == {(amp, f"channels {x}") for amp in ("yes", "no") for x in ("first", "last")}
    printed = capsys.readouterr().out
    for title in ("Inference", "Memory of inference", "Growth with the image", "Training step"):
        assert f"\n{title}\n\n| " in printed


def test_as_a_program_with_a_model_that_transformers_does_not_have(tmp_path):
    path = tmp_path / "report.json"
    command = [sys.executable, ROOT / "tools" / "benchmark_model.py", "--json", path, *SIZE]
    options = ["--device", "cpu", "--repetitions", "1", "--parts", "inference", "memory", "--opts"]
    two_stage = ["MODEL.DEFORMABLE_DETR.TWO_STAGE", "True"]
    plain = ["MODEL.DEFORMABLE_DETR.WITH_BOX_REFINE", "False"]
    done = subprocess.run(
        [*command, *options, *SMALL, *two_stage, *plain], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "transformers is left out: transformers has two-stage models with box" in done.stderr
    report = json.loads(path.read_text())
    assert report["environment"]["command"].startswith("python tools/benchmark_model.py --json")
    assert [x["implementation"] for x in report["inference"]] == ["ddetr_d2"]
    (memory,) = report["memory"]
    assert 0 < memory["extra_mb"] < memory["peak_mb"]


@pytest.mark.parametrize(
    "program, option, values",
    [
        ("benchmark_op", "batch", ["2", "0"]),
        ("benchmark_op", "repetitions", ["0"]),
        ("benchmark_op", "threads", ["0"]),
        ("benchmark_model", "sides", ["400", "0"]),
        ("benchmark_model", "image-size", ["0", "96"]),
    ],
)
def test_errors(run, program, option, values):
    with pytest.raises(UserError, match=f"--{option} is 0; it must be at least 1."):
        run(program, f"--{option}", *values)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda: no usable GPU is here"):
            run(program, "--device", "cuda")
