"""By how much memory grows."""

import contextlib
import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from .timing import Run

MEGABYTE = 1e6


def peak_memory(make: Callable[[], Run]) -> tuple[int, int] | None:
    """Memory on the host that two calls of a function need, measured in a process of its own.

    Two, so that what is kept for the second one counts as well.

    Args:
        make: prepares everything and returns what is measured; it must be picklable.

    Returns:
        bytes by which the process grows, at most, beyond what it had before the first call, and
        the bytes that it then has in all; None where the system does not tell.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_grow, make, torch.get_num_threads()).result()


def _grow(make: Callable[[], Run], threads: int) -> tuple[int, int]:
    torch.set_num_threads(threads)
    run = make()
    # What was freed and kept would hide as much of what the function takes.
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    # From here on the system counts the peak anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    run()
    peak = _status("VmHWM")
    return peak - before, peak


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def peak_gpu_memory(run: Run) -> tuple[int, int]:
    """As :func:`peak_memory`, of the tensors on the GPU; ``run`` has been called before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    return peak - before, peak
