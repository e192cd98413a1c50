"""What a run is beyond weights and optimiser: generators, and figures not written yet."""

import functools
import json
import os
import random
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from detectron2.utils.events import EventStorage
from fvcore.common.history_buffer import HistoryBuffer

# Entries of each history that later medians are made of (Detectron2's window).
_WINDOW = 20
# Figures of the process, which are not those of the run.
_TIMES = {"time", "data_time", "eta_seconds"}


class RunStorage(EventStorage):
    """Detectron2's storage of figures with a memory of the last steps only.

    The longest window that its writers look at is that of the time left, 1,000 steps.
    """

    def __init__(self, start_iter: int = 0):
        super().__init__(start_iter)
        self._history: defaultdict[str, HistoryBuffer] = defaultdict(
            functools.partial(HistoryBuffer, max_length=1000)
        )


def torch_random_state() -> dict[str, Any]:
    """The generators of PyTorch, from which a step draws for dropout."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"torch": torch.get_rng_state(), "cuda": cuda}


def restore_torch_random_state(state: dict[str, Any]) -> None:
    """Bring the generators of PyTorch to what :func:`torch_random_state` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def random_state() -> dict[str, Any]:
    """All random generators of this process, as numbers and tensors."""
    state = np.random.get_state(legacy=False)
    state["state"]["key"] = torch.from_numpy(state["state"]["key"].astype(np.int64))
    return {"python": random.getstate(), "numpy": state, **torch_random_state()}


def restore_random_state(state: dict[str, Any]) -> None:
    """Bring all random generators of this process to what :func:`random_state` gave."""
    random.setstate(state["python"])
    key = state["numpy"]["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": key}})
    restore_torch_random_state(state)


def storage_state(storage: EventStorage, metrics_file: str) -> dict[str, Any]:
    """What a storage of figures needs to go on, and how far ``metrics.json`` has been written."""
    return {
        "histories": {
            name: history.values()[-_WINDOW:] for name, history in storage.histories().items()
        },
        "latest": dict(storage.latest()),
        "hints": dict(storage.smoothing_hints()),
        "metrics_bytes": os.path.getsize(metrics_file) if os.path.isfile(metrics_file) else 0,
    }


def restore_storage(state: dict[str, Any], storage: EventStorage, metrics_file: str) -> None:
    """Continue where :func:`storage_state` was called: lines written since are taken back."""
    written = -1
    if os.path.isfile(metrics_file):
        size = min(state["metrics_bytes"], os.path.getsize(metrics_file))
        os.truncate(metrics_file, size)
        with open(metrics_file) as file:
            for line in file:
                written = max(written, json.loads(line)["iteration"])
    for name, values in state["histories"].items():
        if name in _TIMES:
            continue
        history = storage.histories()[name]
        # What had been written when the run was continued before, as AP, has a history alone.
        value, iteration = state["latest"].get(name, (None, -1))
        waiting = iteration > written
        for earlier, at in values[:-1] if waiting else values:
            history.update(earlier, at)
        if waiting:  # not written yet
            storage.put_scalar(name, value, smoothing_hint=state["hints"][name], cur_iter=iteration)
