"""The report of tools/check_gpu.sh, from what its steps have left."""

import json

from benchmarks import gpu_report


def test_report(tmp_path, capsys):
    steps = [("build", "failed", "7"), ("tests", "done", "40"), ("model", "stopped after 9 s", "9")]
    (tmp_path / "steps.tsv").write_text("".join("\t".join(step) + "\n" for step in steps))
    (tmp_path / "tests.log").write_text("....\n=== 4 passed in 2.00s ===\n")
    (tmp_path / "model.log").write_text(" 0%\r 9%\r64x96, batch 4: other is left out: no GPU.\n")
    record = {"case": "64x96, batch 4", "implementation": "ddetr_d2", "ms": [20.0, 19.0, 21.0]}
    (tmp_path / "model.json").write_text(json.dumps({"environment": {}, "model": [record]}))
    gpu_report.main([str(tmp_path), "--to", str(tmp_path / "docs")])
    written, text = sorted((tmp_path / "docs").iterdir())
    report = json.loads(written.read_text())
    assert [step["outcome"] for step in report["steps"]] == [step[1] for step in steps]
    assert report["steps"][1]["result"] == "4 passed in 2.00s"
    assert report["model"][0]["images_per_second"] == 200
    assert report["environment"]["date"] in text.name
    rows = text.read_text().splitlines()
    assert any(
        "64x96, batch 4 | ddetr_d2" in row and "| 200 |" in " ".join(row.split()) for row in rows
    )
    assert "- 64x96, batch 4: other is left out: no GPU." in rows
