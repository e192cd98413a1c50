"""The folder that a run writes to: writable, the run's alone, and large enough."""

import contextlib
import errno
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator

import torch
from torch import nn

from ..checkpoint.run_folder import PERIODIC
from ..checkpoint.whole_files import PARTIAL, cannot_be_written, remove_partial_files
from ..errors import UserError

_LOCK = ".lock"
# What Detectron2's writers put into metrics.json, log.txt and TensorBoard's file per iteration.
_LOG_BYTES = 150


def make_folder(folder: str) -> None:
    """Make a folder and see whether it can be written.

    Raises:
        UserError: if it cannot.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=PARTIAL) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise UserError(
                f"OUTPUT_DIR {folder} is a file or lies in one; name a folder."
            ) from error
        raise UserError(f"OUTPUT_DIR {folder!r} {cannot_be_written(error, folder)}") from error


@contextlib.contextmanager
def output_folder(folder: str) -> Iterator[None]:
    """Make the folder of a training and keep other trainings out of it.

    For the main process. The lock ends with the process, however that ends; forked data workers
    do not hold it. What a process left that died while it wrote a file is removed.

    Raises:
        UserError: if the folder cannot be written, or another process trains in it.
    """
    make_folder(folder)
    with _lock(folder):
        yield


@contextlib.contextmanager
def _lock(folder: str) -> Iterator[None]:
    log = logging.getLogger(__name__)
    try:
        import fcntl
    except ImportError:  # Windows
        log.warning("This system has no locks of files: keep two runs out of one OUTPUT_DIR.")
        yield
        return
    path = os.path.join(folder, _LOCK)
    try:
        file = open(path, "a+")
    except OSError as error:
        raise UserError(f"{path} {cannot_be_written(error, folder)}") from error
    with file:
        try:
            # Unlike flock's, this lock belongs to the process and not to those that it forks.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                holder = file.read().strip() or "an unknown process"
                raise UserError(
                    f"{holder} is training in OUTPUT_DIR {folder}; give another OUTPUT_DIR, or "
                    "stop that process."
                ) from error
            log.warning(
                f"{folder} is on a file system without locks ({error.strerror}): keep two runs "
                "out of one OUTPUT_DIR."
            )
        else:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            remove_partial_files(folder)
        yield


def checkpoint_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, *, copies: int = 0) -> int:
    """Size of a checkpoint: weights, what the optimiser keeps, ``copies`` of the weights.

    Args:
        model: the detector.
        optimizer: AdamW keeps two values for each parameter, SGD one if it has momentum.
        copies: further copies, such as a moving average.
    """
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    kept = 0
    for group in optimizer.param_groups:
        values = bool(group["momentum"]) if isinstance(optimizer, torch.optim.SGD) else 2
        kept += values * sum(parameter.nbytes for parameter in group["params"])
    return weights * (1 + copies) + kept


def check_disk_space(
    folder: str,
    size: int,
    *,
    iterations: range,
    period: int,
    keep: int = 0,
    best: bool = False,
) -> None:
    """Compare what a run is going to write with the free space of the disk. Quotas do not show.

    Args:
        folder: OUTPUT_DIR, which is there.
        size: bytes of a checkpoint.
        iterations: those to be done, ``range(start, MAX_ITER)``.
        period: iterations from one checkpoint to the next.
        keep: how many periodic checkpoints are kept, 0 for all.
        best: the best checkpoint is kept as well.

    Raises:
        UserError: if there is no room for two checkpoints. Where it does not suffice for all of
            them there is a warning.
    """
    if not iterations:
        return
    periodic = iterations.stop // period - iterations.start // period
    if keep and iterations.start:  # those that are there make room for the next
        there = sum(bool(PERIODIC.fullmatch(name)) for name in os.listdir(folder))
        periodic = min(periodic, max(keep - there, 0))
    elif keep:
        periodic = min(periodic, keep)
    # The final one, the best, and one that is written before an old one goes.
    replaces = bool(keep or best)
    count = periodic + 1 + best + replaces
    needed = count * size + len(iterations) * _LOG_BYTES
    free = shutil.disk_usage(folder).free
    numbers = f"{free / 1e9:.2f} GB are free in OUTPUT_DIR {folder}"
    remedy = "free some space, or give another OUTPUT_DIR"
    if free < min(count, 2) * size:
        raise UserError(
            f"{numbers}, too few for {min(count, 2)} checkpoints of {size / 1e9:.2f} GB: {remedy}."
        )
    if free < needed:
        logging.getLogger(__name__).warning(
            f"{numbers}, but this run will write {needed / 1e9:.2f} GB ({count} checkpoints of "
            f"{size / 1e9:.2f} GB): raise SOLVER.CHECKPOINT_PERIOD ({period}), set "
            f"SOLVER.CHECKPOINTS_KEPT ({keep}), {remedy}."
        )
