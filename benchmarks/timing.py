"""The one timer: calls in turn, so that whatever else the machine does falls on all of them."""

import statistics
import time
from collections.abc import Callable

import torch

Run = Callable[[], object]
Timer = Callable[[Run], float]

# A turn of a short function consists of as many calls as take this long.
TURN_SECONDS, MOST_CALLS = 0.2, 1000
# For which a GPU is kept waiting before a call, in its cycles, and roughly in seconds.
WAIT_CYCLES, WAIT_SECONDS = 10_000_000, 0.006
# Cases that have taken as long as this end after two turns.
CASE_SECONDS, FEWEST_TURNS = 40.0, 2


def wall_seconds(function: Run) -> float:
    """Seconds of one call; on a GPU until it has done what the call gave it."""
    if not torch.cuda.is_initialized():
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def kernel_seconds(function: Run) -> float:
    """Seconds that the GPU works on one call, starting with nothing of its data in the cache.

    The GPU is kept waiting, some 5 ms, until the call has given it all its work: the host's share,
    which in a model runs ahead, is not measured. On a CPU as :func:`wall_seconds`.
    """
    if not torch.cuda.is_initialized():
        return wall_seconds(function)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(1 << 28, dtype=torch.uint8, device="cuda").zero_()
    torch.cuda._sleep(WAIT_CYCLES)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def in_turns(
    functions: dict[str, Run],
    turns: int,
    timer: Timer = wall_seconds,
    after_turn: Callable[[], object] = lambda: None,
    short: bool = False,
) -> dict[str, list[float]]:
    """Time functions in turn: A B A B.

    Args:
        functions: what to time, by name; each has been called before.
        turns: of each. Where all of them together take long, two.
        timer: seconds that one call takes.
        after_turn: called after the turn of one function.
        short: a turn consists of many calls, as far as the function is short, and its duration is
            their median.

    Returns:
        the duration of each turn of each function, in seconds for one call.
    """
    calls, gpu = dict.fromkeys(functions, 1), torch.cuda.is_initialized()
    if short:
        for name, function in functions.items():
            seconds = timer(function) + (WAIT_SECONDS if timer is kernel_seconds and gpu else 0)
            calls[name] = max(1, min(MOST_CALLS, round(TURN_SECONDS / seconds)))
    times: dict[str, list[float]] = {name: [] for name in functions}
    begin = time.monotonic()
    for turn in range(turns):
        if turn >= FEWEST_TURNS and time.monotonic() - begin > CASE_SECONDS:
            break
        for name, function in functions.items():
            times[name].append(statistics.median(timer(function) for _ in range(calls[name])))
            after_turn()
    return times
