"""Several runs as one table."""

import json

from benchmarks import runs


def write(path, milliseconds, growth, date):
    machine = dict.fromkeys(("device", "cores", "threads", "instructions", "load", "torch"), "x")
    machine |= {"python": "3", "date": date, "command": "python -m benchmarks"}
    records = [
        {"case": "a", "implementation": "other", "ms": [9.0, 8.0, 10.0], "times_first": None},
        {"case": "a", "implementation": "ddetr_d2", "ms": [milliseconds, 1.0, 99.0]},
    ]
    records[1] |= {"times_first": [9 / milliseconds, 0.0, 50.0], "growth_mb": growth}
    path.write_text(json.dumps({"environment": machine, "model": records}))
    return str(path)


def test_figures_of_three_runs(tmp_path, capsys):
    figures = [(3.0, 70.0), (2.0, 50.0), (4.5, 90.0)]
    files = [write(tmp_path / f"{i}.json", *x, f"day {i}") for i, x in enumerate(figures)]
    runs.main(files)
    printed = capsys.readouterr().out
    assert all(f"day {i}" in printed for i in range(3)) and "Inference, 3 runs" in printed
    other, ours = [line for line in printed.splitlines() if line.startswith("| a ")]
    assert [x.strip() for x in ours.split("|")[3:-1]] == ["3 (2 to 4.5)", "3 (2 to 4.5)", "70"]
    assert [x.strip() for x in other.split("|")[3:-1]] == ["9 (9 to 9)", "-", "-"]


def test_a_single_run_keeps_the_range_of_its_turns(tmp_path, capsys):
    runs.main([write(tmp_path / "a.json", 3.0, 70.0, "today")])
    printed = capsys.readouterr().out
    assert "Inference, 1 run\n" in printed and "3 (1 to 99)" in printed
