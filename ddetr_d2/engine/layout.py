"""Which processes a run has: from the command line or from torchrun's environment variables."""

import argparse
import contextlib
import os
from dataclasses import dataclass
from urllib.parse import urlsplit

import torch
from detectron2.engine import default_argument_parser

from ..errors import UserError
from .heartbeat import STEP_LIMIT

ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def launch_argument_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, and those that :func:`.launch.launch` has beside them."""
    parser = default_argument_parser()
    parser.add_argument(
        "--num-processes",
        type=int,
        metavar="N",
        help="number of CPU processes *per machine*, in place of --num-gpus",
    )
    parser.add_argument(
        "--hang-limit",
        type=float,
        default=STEP_LIMIT,
        metavar="SECONDS",
        help="end the run when one of several processes makes no progress for this long, in a "
        "training step or evaluation for ten times the usual duration if that is longer "
        "(default: %(default)s)",
    )
    parser.set_defaults(num_gpus=None, dist_url="auto")
    return parser


@dataclass(frozen=True)
class Layout:
    """The processes of a run.

    Attributes:
        local_size: processes on each machine.
        machines: number of machines.
        machine_rank: this machine, from 0.
        backend: of PyTorch's process group, ``"nccl"`` or ``"gloo"``.
        address: host and port of the store; port 0 for any that is free.
    """

    local_size: int
    machines: int = 1
    machine_rank: int = 0
    backend: str = "gloo"
    address: tuple[str, int] = ("127.0.0.1", 0)

    @property
    def world_size(self) -> int:
        return self.local_size * self.machines


def layout_from_arguments(args: argparse.Namespace) -> Layout:
    """The processes that ``args`` ask for.

    Raises:
        UserError: if this machine or the arguments do not allow them.
    """
    if args.num_processes is not None and args.num_gpus is not None:
        raise UserError("--num-processes is for CPUs and --num-gpus for GPUs; give one of them.")
    for name in ("num_processes", "num_gpus", "num_machines"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}; expected at least 1.")
    if not 0 <= args.machine_rank < args.num_machines:
        raise UserError(
            f"--machine-rank {args.machine_rank} with --num-machines {args.num_machines}; "
            f"expected 0 to {args.num_machines - 1}."
        )
    if args.hang_limit <= 0:
        raise UserError(f"--hang-limit {args.hang_limit:g}; expected a number of seconds.")
    on_gpus = args.num_processes is None
    local_size = (args.num_gpus or 1) if on_gpus else args.num_processes
    if on_gpus and local_size * args.num_machines > 1:
        present = torch.cuda.device_count()
        if local_size > present:
            remedy = f"give --num-gpus {present}" if present else "give --num-processes for CPUs"
            raise UserError(
                f"--num-gpus {local_size}, but this machine has {present} usable GPUs; {remedy}."
            )
    return Layout(
        local_size,
        args.num_machines,
        args.machine_rank,
        "nccl" if on_gpus else "gloo",
        _store_address(args.dist_url, args.num_machines),
    )


def _store_address(url: str, machines: int) -> tuple[str, int]:
    if url == "auto":
        if machines > 1:
            raise UserError(
                "--dist-url auto is for one machine; give tcp://HOST:PORT of the first."
            )
        return Layout.address
    parts = urlsplit(url)
    with contextlib.suppress(ValueError):  # raised by an impossible port
        if parts.scheme == "tcp" and parts.hostname and parts.port:
            return parts.hostname, parts.port
    raise UserError(f"--dist-url {url}; expected auto or tcp://HOST:PORT.")


def layout_from_environment(args: argparse.Namespace) -> Layout:
    """The processes that ``torchrun`` or the like have started.

    Raises:
        UserError: if its variables are incomplete, or contradict each other or ``args``.
    """
    missing = [name for name in ENVIRONMENT if not os.environ.get(name)]
    if missing:
        raise UserError(
            "RANK and WORLD_SIZE are set, as by torchrun, but not " + ", ".join(missing) + "."
        )
    try:
        rank, world_size, local_rank, local_size = (int(os.environ[n]) for n in ENVIRONMENT[:4])
    except ValueError as error:
        raise UserError(f"{', '.join(ENVIRONMENT[:4])} must be numbers: {error}.") from None
    if local_size < 1 or world_size % local_size or rank % local_size != local_rank:
        raise UserError(
            f"RANK {rank}, LOCAL_RANK {local_rank}, WORLD_SIZE {world_size} and LOCAL_WORLD_SIZE "
            f"{local_size} do not go together; every machine needs as many processes, in order."
        )
    for name in ("num_processes", "num_gpus"):
        value = getattr(args, name)
        if value not in (None, local_size):
            raise UserError(
                f"--{name.replace('_', '-')} {value}, but {local_size} processes were started here "
                f"from outside; leave it out, or give {local_size}."
            )
    gpus = torch.cuda.device_count() if args.num_processes is None else 0
    if gpus not in (0, 1) and local_size > gpus:
        raise UserError(f"{local_size} processes were started here, but there are {gpus} GPUs.")
    backend = "nccl" if gpus else "gloo"
    return Layout(local_size, world_size // local_size, rank // local_size, backend)
