"""The report of tools/check_gpu.sh: ``python -m benchmarks.gpu_report FOLDER --to docs``.

FOLDER has ``steps.tsv``, with name, outcome and seconds of each step, and what the steps wrote:
NAME.json of ``python -m benchmarks``, and NAME.log.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from .__main__ import PARTS
from .cases import COLUMNS
from .report import Record, environment, table

RATES = {"images_per_second": "images/s"}


def collect(folder: Path, device: str) -> Record:
    """Everything that the steps have found, as far as they came."""
    names = ("step", "outcome", "seconds", "result")
    lines = (folder / "steps.tsv").read_text().splitlines()
    steps = [dict(zip(names, line.split("\t"), strict=False)) for line in lines]
    report: Record = {"environment": environment(device), "steps": steps, "notes": []}
    for step in steps:
        log = folder / f"{step['step']}.log"
        # Of a line of progress, which is written again and again, only the last state.
        said = [x.rpartition("\r")[2] for x in log.read_text().split("\n")] if log.exists() else []
        step["result"] = _result(said)
        report["notes"] += [x.strip() for x in said if " is left out" in x]
        path = folder / f"{step['step']}.json"
        if not path.exists():
            continue
        for part, records in json.loads(path.read_text()).items():
            if part in PARTS:
                report[part] = report.get(part, []) + [_with_rate(part, x) for x in records]
    return report


def _result(said: Sequence[str]) -> str:
    """The line of a log that sums it up: of tests, or of compute-sanitizer."""
    wanted = r"\d+ (passed|failed|skipped|deselected)|ERROR SUMMARY|RACECHECK SUMMARY"
    found = [line.strip("= ") for line in said if re.search(wanted, line)]
    return "; ".join(found[-2:])


def _with_rate(part: str, record: Record) -> Record:
    batch = re.search(r"batch (\d+)", record["case"])
    if part == "operator" or batch is None:
        return record
    return record | {"images_per_second": 1e3 * int(batch[1]) / record["ms"][0]}


def write(report: Record, folder: Path) -> list[Path]:
    """Write the report as JSON and as Markdown, under names with the card and the date."""
    machine = report["environment"]
    card = re.sub(r"[^a-z0-9]+", "-", machine["device"].lower()).strip("-")
    path = folder / f"benchmarks-{card}-{machine['date']}"
    text = [
        f"# Benchmarks: {machine['device']}, {machine['date']}",
        "",
        f"By `tools/check_gpu.sh`, torch {machine['torch']}, CUDA {machine['cuda']}, "
        f"Python {machine['python']}. What the columns mean: [benchmarks.md](benchmarks.md).",
        table("## Steps", report["steps"], {x: x for x in report["steps"][0]}),
    ]
    columns = {**dict(list(COLUMNS.items())[:3]), **RATES, **COLUMNS}
    text += [
        table(f"## {title}", report[part], columns)
        for part, title in PARTS.items()
        if report.get(part)
    ]
    if report["notes"]:
        text += ["\n## Left out\n", *(f"- {x}" for x in report["notes"])]
    paths = [path.with_suffix(".json"), path.with_suffix(".md")]
    for target, content in zip(paths, (json.dumps(report, indent=2), "\n".join(text)), strict=True):
        target.write_text(content + "\n")
    return paths


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", type=Path, default=Path("docs"), metavar="FOLDER")
    args = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.to.mkdir(parents=True, exist_ok=True)
    for path in write(collect(args.folder, device), args.to):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
