"""tools/compare_convergence.py: what is trained, in which order, and what its tables say."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError
from ddetr_d2.modeling import DETR, DeformableDETR

import cv2
import numpy as np
import pytest
from detectron2.modeling import build_model

from ..conftest import ROOT
from ..programs import Program

sys.path.insert(0, str(ROOT / "tools"))

import compare_convergence as tool  # noqa: E402
import convergence_runs  # noqa: E402
from convergence_backbone import cut_objects  # noqa: E402
from convergence_curves import read_curve  # noqa: E402
from convergence_members import MEMBERS  # noqa: E402
from convergence_runs import Comparison, Run, run_all  # noqa: E402
from convergence_settings import Settings  # noqa: E402
from convergence_tables import as_markdown  # noqa: E402

TINY = Settings(
    iterations=100,
    baseline_factor=2,
    interval=10,
    rates=(0.001, 0.01),
    search_iterations=30,
    search_extensions=0,
    baseline_search_factor=2,
    train_images=8,
    val_images=4,
    image_size=64,
    max_objects=2,
    backbone_steps=2,
)


def write_metrics(comparison, run, found, seconds=0.6):
    """A run's metrics.json: AP after each number of iterations."""
    folder = comparison.folder / "runs" / run.name
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"iteration": i - 1, "cpu_time": seconds, "bbox/AP": ap, "bbox/APs": ap / 2}
        for i, ap in found.items()
    ]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def rows(markdown, title):
    """Cells of the table under a heading, by its first column."""
    section = markdown.split(f"### {title}\n\n")[1].split("\n\n")[0]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines()]
    return {row[0]: row[1:] for row in cells[:1] + cells[2:]}


def test_search_first_then_a_seed_of_all_members_then_the_next(tmp_path):
    comparison = Comparison(tmp_path, TINY)
    members = ("detr", "deformable")
    ready, waiting = comparison.todo(members, seeds=2)
    assert ready == [
        Run("detr", 0.001, 0, 60),
        Run("detr", 0.01, 0, 60),
        Run("deformable", 0.001, 0, 30),
        Run("deformable", 0.01, 0, 30),
    ]
    assert waiting == [(member, seed) for seed in (0, 1) for member in members]
    write_metrics(comparison, ready[0], {60: 3.0})
    write_metrics(comparison, ready[1], {60: 2.0})
    write_metrics(comparison, ready[2], {30: 3.0})
    write_metrics(comparison, ready[3], {30: 4.0})
    ready, waiting = comparison.todo(members, seeds=2)
    assert waiting == []
    assert ready == [
        Run("detr", 0.001, 0, 200),
        Run("deformable", 0.01, 0, 100),
        Run("detr", 0.001, 1, 200),
        Run("deformable", 0.01, 1, 100),
    ]
    # The whole run goes on from the run of the search.
    assert ready[0].name == "detr/rate-0.001/seed-0"


def test_search_goes_on_beyond_the_highest_and_the_lowest_rate(tmp_path):
    settings = replace(TINY, rates=(0.0003, 0.001), search_extensions=2)
    comparison = Comparison(tmp_path, settings)
    aps = {0.0001: 2.0, 0.0003: 3.0, 0.001: 4.0, 0.003: 5.0, 0.009: 4.5}
    tried = []
    while not comparison.full_run("deformable", 0):
        for run in comparison.todo(["deformable"], seeds=1)[0]:
            write_metrics(comparison, run, {30: aps[run.rate]})
            tried.append(run.rate)
    assert tried == [0.0003, 0.001, 0.003, 0.009]
    assert comparison.rate("deformable") == 0.003
    for run in comparison.search("detr"):
        write_metrics(comparison, run, {60: -run.rate})
    assert [run.rate for run in comparison.search("detr")] == [0.00009, 0.0003, 0.001]


def test_members_of_the_ablation_take_over_a_rate(tmp_path):
    comparison = Comparison(tmp_path, TINY)
    ready, _ = comparison.todo(("deformable-k1",), seeds=1)
    assert [run.member for run in ready] == ["deformable", "deformable"]
    for run, ap in zip(ready, (1.0, 2.0), strict=True):
        write_metrics(comparison, run, {30: ap})
    assert comparison.full_run("deformable-k1", 0) == Run("deformable-k1", 0.01, 0, 100)


def test_without_a_search_members_have_rates_of_their_own(tmp_path):
    comparison = Comparison(tmp_path, replace(TINY, rates=()))
    ready, waiting = comparison.todo(("detr", "deformable"), seeds=1)
    assert [(run.rate, run.iterations) for run in ready] == [(0.0003, 200), (0.001, 100)]
    assert waiting == []


def test_all_members_are_evaluated_at_the_same_iterations():
    long, short = (TINY.evaluations(TINY.budget(name)) for name in ("detr", "deformable"))
    assert short == [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert long == [*short, 120, 140, 160, 180, 200]


def test_command_differs_in_the_member_alone(tmp_path):
    comparison = Comparison(tmp_path, TINY)
    detr, deformable = (
        comparison.command(Run(member, 0.01, 1, 100)) for member in ("detr", "deformable")
    )
    only_detr = [word for word in detr if word not in deformable]
    options = [str(word) for pair in MEMBERS["detr"].options.items() for word in pair]
    assert set(only_detr) - {"1"} <= {*options, f"{tmp_path}/runs/detr/rate-0.01/seed-1"}
    assert "--resume" in detr


def test_curve_of_a_resumed_run(tmp_path):
    lines = [
        {"iteration": 9, "cpu_time": 6.0, "bbox/AP": 1.0},
        {"iteration": 19, "cpu_time": 6.0, "bbox/AP": 2.0},
        {"iteration": 19, "cpu_time": 12.0, "bbox/AP": 3.0},
        {"iteration": 29, "cpu_time": 6.0},
        {"iteration": 29, "bbox/AP": 5.0, "bbox/APs": 2.5},
    ]
    path = tmp_path / "metrics.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = read_curve(path)
    assert curve.iterations == [10, 20, 30]
    assert curve.minutes == pytest.approx([1.0, 3.0, 4.0])
    assert curve.values["AP"] == [1.0, 3.0, 5.0]
    assert curve.iterations_to("AP", 0.5) == 5
    assert curve.iterations_to("AP", 4.0) == 25
    assert curve.iterations_to("AP", 6.0) is None
    assert curve.until(20).iterations == [10, 20]
    assert read_curve(tmp_path / "missing.json").iterations == []


@pytest.fixture
def finished(tmp_path):
    """Two members and two seeds."""
    comparison = Comparison(tmp_path, TINY)
    members = ("detr", "deformable")
    for run in comparison.todo(members, seeds=2)[0]:
        write_metrics(comparison, run, {run.iterations: run.rate * 100})
    for seed in (0, 1):
        run = comparison.full_run("detr", seed)
        write_metrics(comparison, run, {60: 1.0, 100: 9 - seed * 4, 200: 21 - seed * 2})
        run = comparison.full_run("deformable", seed)
        write_metrics(comparison, run, {30: 2.0, 50: 20 - seed * 4, 100: 30 + seed * 2})
    return comparison, members


def test_tables(finished):
    comparison, members = finished
    results = tool.collect(comparison, members, seeds=2)
    text = as_markdown(results)
    equal = rows(text, "AP at equal iterations")
    assert equal["iterations"] == ["50", "100", "200"]
    assert equal["DETR"] == ["", "7.0 ± 2.8", "20.0 ± 1.4"]
    assert equal["Deformable DETR"] == ["18.0 ± 2.8", "31.0 ± 1.4", ""]
    # 18 is 90% of 20. The mean of DETR goes from 7 after 100 to 20 after 200; that of Deformable
    # DETR is 18 after 50.
    needed = rows(text, "Iterations to equal AP")
    assert needed["DETR"][0] == "185"
    assert needed["Deformable DETR"][0] == "50 (3.7 x)"
    # DETR does not come to 30 within 200; Deformable DETR goes from 18 after 50 to 31 after 100.
    assert needed[""][-1] == "AP 30"
    assert needed["DETR"][-1] == "not reached"
    assert needed["Deformable DETR"][-1] == "96 (> 2.1 x)"
    budget = rows(text, "Budget")
    # 8 images in batches of 4: 2 iterations an epoch; 0.6 seconds each.
    assert budget["DETR"] == ["2 of 2", "0.01", "200", "100.0", "2.0", "600"]
    search = rows(text, "Search of the learning rate")
    assert search[""] == ["0.001", "0.01"]
    assert search["Deformable DETR"] == ["0.1", "**2.0**"]


def test_unfinished_runs_do_not_count(finished):
    comparison, members = finished
    write_metrics(comparison, comparison.full_run("detr", 1), {60: 1.0, 100: 9})
    results = tool.collect(comparison, members, seeds=2)
    assert list(results.curves["detr"]) == [0]
    assert rows(as_markdown(results), "Budget")["DETR"][0] == "1 of 2"


def test_draw_only(finished, monkeypatch, capsys):
    comparison, members = finished
    monkeypatch.setattr(tool, "Settings", lambda: TINY)
    tool.main([*members, "--seeds", "2", "--draw-only", "--output", str(comparison.folder)])
    assert cv2.imread(str(comparison.folder / "convergence.png")).shape[1] > 800
    content = json.loads((comparison.folder / "convergence.json").read_text())
    assert content["members"]["detr"]["seeds"]["1"]["AP"] == [1.0, 5, 19]
    first = content["members"]["deformable"]["iterations_to"]["AP"][0]
    assert first["level"] == pytest.approx(18)
    assert first["iterations"] == pytest.approx(50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["detrr"], "'detrr'; did you mean detr"),
        (["detr", "detr"], "twice"),
        (["detr", "--ablation"], "not both"),
        (["--seeds", "0"], "--seeds 0"),
        (["--iterations", "1150"], "no evaluation after 1150 iterations, only after 1000 and 1200"),
        (["--draw-only"], "no finished run"),
    ],
)
def test_mistakes(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        tool.main([*arguments, "--output", str(tmp_path / "new")])


def test_folder_of_another_comparison(tmp_path):
    Comparison(tmp_path, TINY)
    Comparison(tmp_path, TINY)
    Comparison(tmp_path, replace(TINY, iterations=200))  # goes on with the runs that are there
    with pytest.raises(UserError, match="with max_objects 2, and now it is 3"):
        Comparison(tmp_path, replace(TINY, max_objects=3))


def test_failed_run_is_named(tmp_path, monkeypatch):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('no luck')")
    monkeypatch.setattr(convergence_runs, "PROGRAM", script)
    comparison = Comparison(tmp_path, replace(TINY, rates=()))
    with pytest.raises(UserError, match="deformable/rate-0.001/seed-0 ended with.* 1.*no luck"):
        run_all(comparison, ["deformable"], 1, 1, lambda *_: None)


@pytest.mark.parametrize("member", MEMBERS)
def test_every_member_can_be_built(member):
    options = [str(word) for pair in MEMBERS[member].options.items() for word in pair]
    cfg = setup_cfg(str(convergence_runs.CONFIG_FILE), options)
    cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES = 1
    model = build_model(cfg)
    assert isinstance(model, DETR if member == "detr" else DeformableDETR)


class Forked:
    """A run as a fork of a process that has imported everything, in subprocess.Popen's terms."""

    def __init__(self, command):
        self._program = Program(Path(command[1]), *command[2:])

    @property
    def returncode(self):
        return self._program.process.exitcode

    def poll(self):
        return self.returncode

    def terminate(self):
        self._program.process.terminate()

    def wait(self):
        self._program.process.join()


def test_an_interrupted_comparison_goes_on(tmp_path, monkeypatch):
    started = []

    def start(comparison, run):
        started.append(run)
        return Forked(comparison.command(run))

    monkeypatch.setattr(convergence_runs, "_start", start)
    comparison = Comparison(tmp_path, replace(TINY, iterations=4, interval=1, search_iterations=2))
    comparison.prepare([0])
    members, finished = ["deformable", "deformable-k1"], []

    def stop_after_the_search(run, seconds):
        finished.append(run)
        if len(finished) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all(comparison, members, 1, 1, stop_after_the_search)
    assert [(run.rate, run.iterations) for run in started] == [(0.001, 2), (0.01, 2)]
    whole = comparison.full_run("deformable", 0)
    searched = comparison.curve(whole)
    assert searched.iterations == [1, 2]

    run_all(comparison, members, 1, 1, lambda *_: None)
    assert started[2:] == [whole, comparison.full_run("deformable-k1", 0)]
    curve = comparison.curve(whole)
    assert curve.iterations == [1, 2, 3, 4]
    assert curve.until(2) == searched  # nothing was done twice
    assert all(minutes > 0 for minutes in curve.minutes)
    assert comparison.todo(members, 1) == ([], [])


def test_objects_are_cut_out_in_the_middle_of_a_square(tmp_path):
    image = np.zeros((100, 200, 3), np.uint8)
    image[40:60, 100:140] = (0, 0, 255)  # red, in OpenCV's order
    cv2.imwrite(str(tmp_path / "a.png"), image)
    content = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "not_needed.png"}],
        "annotations": [{"image_id": 1, "category_id": 7, "bbox": [100, 40, 40, 20]}],
        "categories": [{"id": 3}, {"id": 7}],
    }
    (tmp_path / "a.json").write_text(json.dumps(content))
    images, labels = cut_objects(tmp_path / "a.json", tmp_path)
    assert labels.tolist() == [1]
    red = images[0, 0] > 127
    assert not images[0, 1:].any()
    # 40 of 56 pixels become 46 of 64, 20 become 23.
    assert red.any(0).nonzero().flatten()[[0, -1]].tolist() == pytest.approx([9, 54], abs=1)
    assert red.any(1).nonzero().flatten()[[0, -1]].tolist() == pytest.approx([21, 42], abs=1)
