"""tools/soak.py."""

import csv
import importlib.util
import multiprocessing
import os
import subprocess
import sys
import time

from ddetr_d2.errors import UserError

import pytest

from ..conftest import ROOT

SPEC = importlib.util.spec_from_file_location("soak", ROOT / "tools" / "soak.py")
soak = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(soak)


def samples(**processes):
    """Samples every 10 steps up to 1,000, of processes whose Rss is a function of the step."""
    return [
        soak.Sample(step, name, rss(step), 0.0, rss(step) / 2)
        for step in range(0, 1001, 10)
        for name, rss in processes.items()
        if rss(step)
    ]


def growth(found, window=50):
    return {entry.name: entry.share for entry in soak.judge(found, 100, 900, window)}


def test_memory_that_grows_is_told_from_memory_that_does_not():
    found = growth(samples(main=lambda step: 500.0, worker=lambda step: 200 + step / 10))
    assert found["main"] == 0
    assert found["worker"] == pytest.approx(80 / 212)
    assert found[soak.ALL] == pytest.approx(80 / 712)


def test_what_is_there_at_the_start_or_for_a_moment_does_not_count():
    found = growth(samples(main=lambda step: 400.0 if step < 100 else 900 if step == 910 else 500))
    assert found["main"] == 0


def test_processes_that_come_and_go_count_in_the_sum_alone():
    found = growth(samples(main=lambda step: 500.0, evaluation=lambda step: 300.0 * (step > 800)))
    assert found == {"main": 0, soak.ALL: pytest.approx(0.6)}


def test_a_run_without_samples_at_one_of_the_steps():
    with pytest.raises(UserError, match="too quick"):
        growth(samples(main=lambda step: 500.0 * (step < 500)))


def test_memory_of_a_process_and_its_child():
    child = subprocess.Popen([sys.executable, "-c", "x = b'x' * 50_000_000; input()"], stdin=-1)
    try:
        processes = soak.Processes(os.getpid())
        end = time.monotonic() + 30
        while time.monotonic() < end:
            helpers = [s for s in processes.sample(7) if s.name.startswith("helper process")]
            # Before it, a copy of this process; then one that is not yet all there.
            found = [s for s in helpers if s.rss < 100 and s.proportional > 50]
            if found:
                break
    finally:
        child.communicate(b"\n")
    assert found[0].step == 7
    assert 50 < found[0].proportional <= found[0].anonymous <= found[0].rss < 100


def test_a_forked_process_is_a_data_worker():
    context = multiprocessing.get_context("fork")
    event = context.Event()
    child = context.Process(target=event.wait)
    child.start()
    try:
        names = {sample.name for sample in soak.Processes(os.getpid()).sample(0)}
    finally:
        event.set()
        child.join()
    assert {"main process", "data worker 1"} <= names


def test_steps_that_are_being_written(tmp_path):
    path = tmp_path / "metrics.json"
    assert soak.steps_done(path) == 0
    path.write_text('{"iteration": 19}\n{"iteration": 39}\n{"itera')
    assert soak.steps_done(path) == 40


def test_a_short_run(tmp_path, capsys):
    short = ["--steps", "40", "--early", "20", "--window", "20", "--workers", "1"]
    once = ["TEST.EVAL_PERIOD", "0", "SOLVER.IMS_PER_BATCH", "1"]
    folder = ["--output", str(tmp_path), "--interval", "0.05"]
    assert soak.main([*short, *folder, "--limit", "1", *once]) == 0
    table = capsys.readouterr().out
    assert "| main process" in table and "| data worker 1" in table and soak.ALL in table
    with open(tmp_path / "memory.csv") as file:
        rows = [*csv.DictReader(file)]
    assert {"main process", "data worker 1"} <= {row["name"] for row in rows}
    assert (tmp_path / "memory.png").stat().st_size > 1000


@pytest.mark.parametrize(("slope", "code"), [(0.01, 0), (0.05, 1)])
def test_the_exit_code_tells_of_processes_that_grow(slope, code, tmp_path, monkeypatch, capsys):
    found = samples(main=lambda step: 500.0, worker=lambda step: 200 + slope * step)
    monkeypatch.setattr(soak, "run_training", lambda args, output: found)
    arguments = ["--output", str(tmp_path), "--early", "100", "--steps", "900"]
    assert soak.main(arguments) == code
    assert ("worker" in capsys.readouterr().err) == bool(code)


def test_a_training_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UserError, match="exit code 1; see .*training.txt"):
        soak.main(["--output", str(tmp_path)])
