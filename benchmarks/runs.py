"""Several runs as one table: ``python -m benchmarks.runs FIRST.json SECOND.json THIRD.json``.

Each figure is the median of the runs' figures; those with a range have the lowest and the highest
of them in brackets, so they tell how far a figure changes from run to run. A case that a single run
has keeps the range of its turns.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from .__main__ import PARTS
from .cases import COLUMNS, spread
from .report import Record, describe, table


def join(runs: Sequence[Sequence[Record]]) -> list[Record]:
    """One record for each case and implementation, in the order of the first run."""
    named = [{(x["case"], x["implementation"]): x for x in run} for run in runs]
    return [
        {key: _join([run[name].get(key) for run in named if name in run]) for key in COLUMNS}
        for name in named[0]
    ]


def _join(values: Sequence) -> object:
    if isinstance(values[0], list) and len(values) > 1:  # median, lowest and highest in a run
        return spread([value[0] for value in values])
    if isinstance(values[0], float):
        return statistics.median(values)
    return values[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.runs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what --json wrote")
    reports = [json.loads(file.read_text()) for file in parser.parse_args(arguments).files]
    for report in reports:
        print(describe(report["environment"]), end="\n\n")
    for part, title in PARTS.items():
        found = [report[part] for report in reports if part in report]
        if found:
            count = "1 run" if len(found) == 1 else f"{len(found)} runs"
            print(table(f"{title}, {count}", join(found), COLUMNS))


if __name__ == "__main__":
    main()
