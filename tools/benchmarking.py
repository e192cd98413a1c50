"""What the benchmark programs share: timing side by side, peak memory, the report and its JSON."""

import argparse
import contextlib
import ctypes
import datetime
import gc
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from ddetr_d2.errors import UserError

MEGABYTE = 1e6
Run = Callable[[], object]
Timer = Callable[[Run], float]
Record = dict[str, Any]


def wall_seconds(function: Run) -> float:
    """Duration of one call, until the GPU, if any is in use, has done what the call gave it."""
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


class KernelTimer:
    """Duration of one call on the GPU alone, starting with nothing of its data in the cache.

    The GPU is kept waiting until the call has given it all its work, so that the host's share,
    which in a model runs ahead, is not measured.
    """

    WAIT_CYCLES = 10_000_000  # some 5 ms

    def __init__(self):
        self._larger_than_caches = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self, function: Run) -> float:
        self._larger_than_caches.zero_()
        torch.cuda._sleep(self.WAIT_CYCLES)
        self._start.record()
        function()
        self._end.record()
        self._end.synchronize()
        return self._start.elapsed_time(self._end) / 1e3


def side_by_side(
    functions: dict[str, Run],
    rounds: int,
    progress: tqdm,
    timer: Timer = wall_seconds,
    seconds: float = 0.0,
) -> dict[str, list[float]]:
    """Time functions in turn, so that whatever else the machine does falls on all of them.

    Args:
        functions: what to time, by name; each has been called before.
        rounds: times that it is every function's turn.
        progress: advanced by one for each turn.
        timer: seconds that one call takes.
        seconds: a turn consists of as many calls, 20 at most, as take this long; by default of one.

    Returns:
        the durations of all calls of each function, in seconds.
    """
    calls = dict.fromkeys(functions, 1)
    if seconds:
        for name, function in functions.items():
            calls[name] = max(1, min(20, round(seconds / timer(function))))
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            times[name] += [timer(function) for _ in range(calls[name])]
            progress.update()
    return times


def summary(times: Sequence[float]) -> Record:
    """Median and quickest of durations in seconds, in milliseconds, and their number."""
    return {
        "median_ms": statistics.median(times) * 1e3,
        "fastest_ms": min(times) * 1e3,
        "calls": len(times),
    }


def peak_memory(make: Callable[..., Run], *arguments: object) -> tuple[int, int] | None:
    """Memory on the host that a function needs, measured in a process of its own.

    Args:
        make: a function of a module, which prepares everything and returns what is measured.
        arguments: what it gets; they must be picklable.

    Returns:
        bytes by which the process grows, at most, beyond what it had when the function was called,
        and the bytes that it then has in all; None where the system does not tell.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_grow, make, arguments, torch.get_num_threads()).result()


def _grow(make: Callable[..., Run], arguments: Sequence[object], threads: int) -> tuple[int, int]:
    torch.set_num_threads(threads)
    function = make(*arguments)
    # What was freed and kept would hide as much of what the function takes.
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    # From here on the system counts the peak anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    function()
    peak = _status("VmHWM")
    return peak - before, peak


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def peak_gpu_memory(function: Run) -> tuple[int, int]:
    """As :func:`peak_memory`, of the tensors on the GPU; ``function`` has been called before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return peak - before, peak


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that all programs have."""
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default=usual, help=f"(default: {usual})"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="threads on the CPU")
    parser.add_argument(
        "--repetitions", type=int, metavar="N", help="turns of each (default: 5; on a GPU 10)"
    )
    parser.add_argument(
        "--image-size",
        nargs=2,
        type=int,
        default=(800, 1066),
        metavar=("HEIGHT", "WIDTH"),
        help="in pixels (default: 800 1066)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")


def prepare(args: argparse.Namespace, **counts: Sequence[int]) -> None:
    """Check and complete the options of :func:`add_options`, and set the number of threads.

    Args:
        args: the options; ``repetitions`` is filled in.
        counts: values of further options that must be at least 1, by name.

    Raises:
        UserError: if one of them is out of range or the device is not here.
    """
    gpu = args.device == "cuda"
    if gpu and not torch.cuda.is_available():
        raise UserError("--device cuda: no usable GPU is here; take --device cpu.")
    if args.repetitions is None:
        args.repetitions = 10 if gpu else 5
    counts |= {"repetitions": [args.repetitions], "image_size": args.image_size}
    if args.threads is not None:
        counts["threads"] = [args.threads]
    for name, values in counts.items():
        if min(values) < 1:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{option} is {min(values)}; it must be at least 1.")
    if args.threads is not None:
        torch.set_num_threads(args.threads)


def environment(device: str) -> Record:
    """Machine, versions, date and command, as they belong to every figure."""
    gpu = device == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", f"tools/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
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
    """A line for the head of a report."""
    parts = [machine["device"], f"{machine['cores']} cores, {machine['threads']} threads"]
    parts += [machine["instructions"], f"load {machine['load']}"]
    parts += [f"torch {machine['torch']}", f"Python {machine['python']}", machine["date"]]
    return f"{', '.join(parts)}\n{machine['command']}"


def table(title: str, records: Sequence[Record], columns: dict[str, str]) -> str:
    """A Markdown table of the keys of ``records`` that ``columns`` gives headings to."""
    rows = [[_text(record.get(key)) for key in columns] for record in records]
    align = ["left" if isinstance(records[0].get(key), str) else "right" for key in columns]
    body = tabulate(rows, list(columns.values()), "github", colalign=align, disable_numparse=True)
    return f"\n{title}\n\n{body}"


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
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
    print(f"\nwrote {path}")


def note(message: str) -> None:
    """Say something beside the report, below the line of progress."""
    tqdm.write(message, file=sys.stderr)
