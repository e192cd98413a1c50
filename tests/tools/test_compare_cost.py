"""tools/compare_cost.py: exponents, what is left out, and what it writes, at tiny sizes."""

import importlib
import json
import math
import re

from ddetr_d2.errors import UserError

import pytest
import torch

from ..conftest import ROOT, TINY

SMALL = [*TINY, "MODEL.RESNETS.NORM", "FrozenBN"]


@pytest.fixture
def cost(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("compare_cost")


@pytest.fixture
def figures(cost):
    return importlib.import_module("cost_figures")


@pytest.fixture
def run(cost, tmp_path):
    """Run the program on the CPU, with a single turn; returns the report."""

    def run(*arguments, opts=SMALL):
        fixed = ["--output", str(tmp_path), "--device", "cpu", "--repetitions", "1"]
        cost.main([*fixed, *arguments, "--opts", *opts])
        return json.loads((tmp_path / "cost.json").read_text())

    return run


@pytest.mark.parametrize("power", [1.0, 1.37, 2.0])
def test_exponent_of_a_power_law(figures, power):
    sizes = [100, 200, 400, 800]
    assert figures.exponent(sizes, [3 * x**power for x in sizes]) == pytest.approx(power)


def test_exponent_is_that_of_the_upper_end(figures):
    """From half the largest short side on, a quarter of the pixels, whatever is below."""
    sizes = [10, 50, 100, 200, 400]
    values = [7.0, 7.0, *(2 * x**1.5 for x in sizes[2:])]
    assert figures.exponent(sizes, values) == pytest.approx(1.5)
    values[2] *= 1.01  # a quarter itself belongs to it
    assert figures.exponent(sizes, values) < 1.499
    assert figures.exponent([10], [1.0]) is None
    assert figures.exponent([10, 41], [1.0, 2.0]) is None


def test_prediction_goes_on_as_the_last_two_sizes(cost):
    assert cost.predicted([10, 20, 40], [5.0, 3.0, 6.0], 80) == pytest.approx(12)
    assert cost.predicted([10, 20], [1.0, 4.0], 40) == pytest.approx(16)
    # Measurements scatter: never faster than quadratic, never falling.
    assert cost.predicted([10, 20], [1.0, 16.0], 40) == pytest.approx(64)
    assert cost.predicted([10, 20], [2.0, 1.0], 40) == pytest.approx(1)
    assert cost.predicted([10], [3.0], 40) == pytest.approx(12)
    assert cost.predicted([], [], 40) is None


def test_peak_memory_is_that_of_the_tensors_at_once(cost):
    def three_of_five():
        kept = [torch.ones(1000), torch.ones(1000)]
        for _ in range(3):
            torch.ones(1000)
        return kept

    assert cost.peak_bytes(three_of_five, "cpu") == 3 * 4000


def test_memory_of_an_encoder_layer(cost):
    """Of dense attention at least scores, probabilities and their gradients for each head, of
    deformable attention nothing that grows faster than the tokens."""
    cases = importlib.import_module("cost_cases")
    peaks = {}
    for member in ("dense", "deformable"):
        model = cases.build(member, "cpu", SMALL)
        for size in ((256, 256), (512, 512)):
            run = cases.case(model, "encoder layer", "forward + backward", size)
            peaks[member, size[0]] = cases.peak_bytes(run, "cpu")
    tokens, heads = 32 * 32, 8
    assert peaks["dense", 512] > 3 * heads * tokens**2 * 4
    assert peaks["dense", 512] / peaks["dense", 256] > 12
    assert peaks["deformable", 512] / peaks["deformable", 256] < 4.5


def test_what_it_writes(run, figures, tmp_path, capsys):
    report = run("--short-sides", "64", "48")
    assert (tmp_path / "cost.png").stat().st_size > 10_000
    records = report["records"]
    keys = {(x["part"], x["pass"], x["member"], x["height"]) for x in records}
    assert len(keys) == len(records) == 2 * 2 * 3 * 2
    assert all(x["seconds"] > 0 and x["megabytes"] > 0 for x in records)
    assert {(x["height"], x["width"]) for x in records} == {(48, 64), (64, 85)}
    text = (tmp_path / "cost.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert len(re.findall(r"^\| (?:encoder layer|model) ", text, re.MULTILINE)) == 2 * 2 * 2 * 3
    (first,) = [x for x in report["exponents"] if x["quantity"] == "seconds"][:1]
    wanted = {key: first[key] for key in ("part", "pass", "member")}
    small, large = sorted(
        (x["pixels"], x["seconds"]) for x in records if wanted.items() <= x.items()
    )
    slope = math.log(large[1] / small[1]) / math.log(large[0] / small[0])
    assert first["exponent"] == pytest.approx(slope)


def test_figures_that_are_there_are_kept(run, tmp_path):
    before = run("--short-sides", "48", "--parts", "encoder layer")["records"]
    after = run("--short-sides", "48", "64", "--parts", "encoder layer")["records"]
    assert after[: len(before)] == before
    assert len(after) == 2 * len(before) == 12
    with pytest.raises(UserError, match="has figures under other conditions .options .*, now "):
        run("--short-sides", "48", opts=[*SMALL, "MODEL.DEFORMABLE_DETR.ENC_LAYERS", "2"])
    (tmp_path / "cost.json").write_text("{}")
    with pytest.raises(UserError, match="cost.json cannot be read; remove it"):
        run("--short-sides", "48")


def test_sizes_beyond_memory_or_time_are_left_out(run, cost, monkeypatch, capsys):
    monkeypatch.setattr(cost, "free_bytes", lambda device: 2e6)
    report = run("--short-sides", "64", "256", "--parts", "encoder layer")
    left_out = [x for x in report["left_out"] if "forward + backward, dense" in x]
    assert len(left_out) == 1 and "256 is left out, it would need about" in left_out[0]
    assert left_out[0] in capsys.readouterr().out
    kept = {(x["member"], x["pass"], x["height"]) for x in report["records"]}
    assert ("dense", "forward + backward", 64) in kept
    assert ("dense", "forward + backward", 256) not in kept

    clock = iter(range(0, 10**9, 600))  # ten minutes pass whenever it is looked at
    monkeypatch.setattr(cost.time, "monotonic", lambda: next(clock))
    report = run("--short-sides", "96", "--parts", "encoder layer", "--minutes", "5")
    assert any("96 is left out, it would end later than --minutes" in x for x in report["left_out"])
    assert not any(x["height"] == 96 for x in report["records"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--short-sides", "16"], "--short-sides 16: give 32 pixels or more"),
        (["--repetitions", "0"], "--repetitions is 0; it must be at least 1"),
        (["--threads", "0"], "--threads is 0; it must be at least 1"),
        (["--minutes", "0"], "--minutes is 0; it must be at least 1"),
        (["--output", "/dev/null/x"], "--output /dev/null/x: Not a directory"),
    ],
)
def test_mistakes_are_explained(run, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run(*arguments)


def test_no_gpu(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cuda: no usable GPU is here"):
        run("--device", "cuda")
