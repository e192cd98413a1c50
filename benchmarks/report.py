"""What is printed and written: the machine, the table, the JSON file."""

import contextlib
import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddetr_d2.errors import UserError

import torch
from tabulate import tabulate
from tqdm import tqdm

Record = dict[str, Any]


def environment(device: str) -> Record:
    """Machine, versions, date and command, as they belong to every figure."""
    gpu = device == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "device": torch.cuda.get_device_name() if gpu else _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        # Of other programs as well, before anything was measured.
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe(machine: Record) -> str:
    """A line for the head of a report, and the command."""
    parts = [machine["device"], f"{machine['cores']} cores, {machine['threads']} threads"]
    parts += [machine["instructions"], f"load {machine['load']}"]
    parts += [f"torch {machine['torch']}", f"Python {machine['python']}", machine["date"]]
    return f"{', '.join(parts)}\n{machine['command']}"


def table(title: str, records: Sequence[Record], columns: dict[str, str]) -> str:
    """A Markdown table of the keys of ``records`` that ``columns`` gives headings to.

    Columns without any value are left out.
    """
    columns = {
        key: heading
        for key, heading in columns.items()
        if any(record.get(key) is not None for record in records)
    }
    rows = [[_text(record.get(key)) for key in columns] for record in records]
    align = ["left" if isinstance(records[0].get(key), str) else "right" for key in columns]
    body = tabulate(rows, list(columns.values()), "github", colalign=align, disable_numparse=True)
    return f"\n{title}\n\n{body}"


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    if isinstance(value, list):
        return "{} ({} to {})".format(*map(_text, value))
    return str(value)


def write_json(path: str | None, report: Record) -> None:
    """Write the report, if a file is named for it.

    Raises:
        UserError: if it cannot be written.
    """
    if path is None:
        return
    try:
        Path(path).write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: {error.strerror}.") from error


def note(message: str) -> None:
    """Say something beside the report, below the line of progress."""
    tqdm.write(message, file=sys.stderr)
