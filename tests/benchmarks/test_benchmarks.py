"""``python -m benchmarks --quick``: every case runs, and is reported."""

import json
import subprocess
import sys

from ddetr_d2.config import config_file
from ddetr_d2.errors import UserError

import pytest
import torch

from benchmarks import models
from benchmarks.__main__ import QUICK_MODEL, main

from ..conftest import ROOT

OPTIONS = [word for item in QUICK_MODEL.items() for word in item]


@pytest.fixture
def run(tmp_path):
    """Run it on the CPU; returns the records of its part by case and implementation."""

    def run(part, *arguments):
        path = tmp_path / "report.json"
        main([part, "--quick", "--device", "cpu", "--json", str(path), *arguments])
        return {(x["case"], x["implementation"]): x for x in json.loads(path.read_text())[part]}

    return run


def test_operator(run, capsys):
    found = run("operator", "--dtype", "float32")
    for workload in ("encoder", "decoder"):
        for direction in ("forward", "forward + backward"):
            case = f"{workload}, 64x96, batch 2, float32, {direction}"
            for name in ("transformers", "reference", "ddetr_d2"):
                assert found[case, name]["difference"] < 1e-5
                assert found[case, name]["limit_share"] > 0
            ratio, lowest, highest = found[case, "ddetr_d2"]["times_first"]
            assert 0 < lowest <= ratio <= highest
    case = "host time, one query, forward, gradients wanted"
    assert 0 < found[case, "grid_sample alone"]["ms"][0] < found[case, "transformers"]["ms"][0]
    prefixes = ("| encoder", "| decoder", "| host")
    rows = [x for x in capsys.readouterr().out.splitlines() if x.startswith(prefixes)]
    assert len(rows) == len(found)


def test_16_bits_of_the_operator(run):
    case = "decoder, 64x96, batch 1, bfloat16, forward + backward"
    found = run("operator", "--dtype", "bfloat16", "--only", case)
    assert found[case, "ddetr_d2"]["difference"] < 0.01


def test_models_with_weights(run, tmp_path):
    """The detector's and transformers', of a checkpoint."""
    models.write_weights(str(tmp_path), config_file("detr"), "", OPTIONS)
    found = run(
        "model", "--weights", str(tmp_path / "model.pth"), "--sizes", "96x64", "--only", "96x64"
    )
    ours = ["ddetr_d2", "ddetr_d2, bfloat16"]
    names = {1: ["transformers", *ours], 4: ours}
    assert list(found) == [(f"96x64, batch {n}", name) for n in names for name in names[n]]
    assert found["96x64, batch 1", "ddetr_d2"]["difference"] < 1e-5
    for batch in (1, 4):
        record = found[f"96x64, batch {batch}", "ddetr_d2, bfloat16"]
        assert 1e-4 < record["difference"] < 0.2
        assert 0 < record["limit_share"] < 1
        assert record["times_ours"][0] > 0


def test_layers(run):
    found = run("model", "--only", "layer", "--dtype", "float32")
    assert len(found) == len(models.LAYERS)
    for (case, name), record in found.items():
        assert (case.startswith("layer, "), name) == (True, "ddetr_d2")
        assert 0 < record["ms"][0] < 60_000


def test_a_model_that_transformers_does_not_have(run, capsys):
    two_stage = ["MODEL.DEFORMABLE_DETR.TWO_STAGE", "True"]
    plain = ["MODEL.DEFORMABLE_DETR.WITH_BOX_REFINE", "False"]
    found = run("model", "--only", "batch 1", "--opts", *two_stage, *plain)
    assert [name for _, name in found] == ["ddetr_d2", "ddetr_d2, bfloat16"]
    assert "transformers is left out: transformers has two-stage models" in capsys.readouterr().err


def test_training(run):
    found = run("training")
    # The losses are the same, and almost the same in 16 bits.
    assert found["64x96, batch 2", "ddetr_d2"]["difference"] < 1e-5
    assert found["64x96, batch 2", "transformers"]["times_first"] is None
    assert 1e-6 < found["64x96, batch 2", "ddetr_d2, bfloat16"]["difference"] < 0.05
    assert found["64x96, batch 4", "ddetr_d2, checkpointed"]["difference"] == 0
    assert found["make demo, 64x96, batch 2", "ddetr_d2, bfloat16"]["times_ours"][0] > 0


def test_exported_models(run, capsys):
    pytest.importorskip("onnxruntime")
    found = run("export")
    said = capsys.readouterr().err
    names = [name for _, name in found]
    assert names[:2] == ["ddetr_d2", "onnxruntime"] and names[-1] == "TorchScript"
    assert ("OpenVINO" in names) != ("OpenVINO is left out, pip install openvino" in said)
    for (_, name), record in found.items():
        if name != "ddetr_d2" and "bfloat16" not in name:
            assert record["difference"] < 1e-5


def test_as_a_program(tmp_path):
    path = tmp_path / "report.json"
    options = ["--quick", "--only", "one query, forward", "--json", str(path)]
    command = [sys.executable, "-m", "benchmarks", "operator", *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Multi-scale deformable attention\n\n| case" in done.stdout
    environment = json.loads(path.read_text())["environment"]
    assert environment["command"].startswith("python -m benchmarks operator --quick --only")
    assert " left, " in done.stderr  # the time


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["modle"], "there is no part 'modle'; there are operator, model, training, export."),
        (["--repeats", "0"], "--repeats is 0; it must be at least 1."),
        (["--threads", "0"], "--threads is 0; it must be at least 1."),
        (["--sizes", "800x1066", "64x0"], "--sizes 64x0: give HEIGHTxWIDTH in pixels"),
        (["--sizes", "800"], "--sizes 800: give HEIGHTxWIDTH in pixels"),
        (["operator", "--only", "nothing"], "--only 'nothing': no case has that in its name."),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: no usable GPU is here"):
        main(["--device", "cuda"])
