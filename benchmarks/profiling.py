"""Where the time of one call goes, by PyTorch's profiler."""

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from .report import Record
from .timing import Run

LONGEST = 15  # operators that are listed
# Parts of the names of operators that are convolutions and matrix products.
MATRIX = ("convolution", "conv2d", "linear", "mm", "dot_product_attention")
# What the host calls on a GPU.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize")


def profile(run: Run, device: str) -> Record:
    """Profile one call.

    Args:
        run: what is called; it has been called before.
        device: ``cpu`` or ``cuda``.

    Returns:
        ``matrix_share``, the part of all operators' time that convolutions and matrix products
        take; ``operators``, those that take longest by themselves; and on a GPU ``launches`` of
        kernels and ``waits`` of the host.
    """
    cuda = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    # Each kernel on a GPU stands there again, as a row of its own.
    events = [x for x in profiler.key_averages() if x.device_type == DeviceType.CPU]
    times = {x.key: getattr(x, key) / 1e3 for x in events}
    calls = {x.key: x.count for x in events}
    total = sum(times.values())
    longest = sorted(times.items(), key=lambda item: -item[1])[:LONGEST]
    found: Record = {
        "matrix_share": sum(ms for name, ms in times.items() if any(x in name for x in MATRIX))
        / total,
        "operators": [
            {"operator": name, "calls": calls[name], "ms": ms, "share": ms / total}
            for name, ms in longest
        ],
    }
    if cuda:
        for name, wanted in (("launches", LAUNCHES), ("waits", WAITS)):
            found[name] = sum(n for key, n in calls.items() if key.startswith(wanted))
    return found
