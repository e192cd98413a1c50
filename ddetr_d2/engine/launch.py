"""Runs the program in one process or several: on CPUs or GPUs, on one machine or many.

``--num-gpus N`` and ``--num-processes N`` start N processes on this machine, which talk through
NCCL and Gloo. Under ``torchrun``, or Slurm's ``srun`` with the same environment variables, this
process is one of them already, and none is started.

However the processes come about, they meet in one key-value store, join a process group and
:mod:`detectron2.utils.comm`, and watch each other (:mod:`.heartbeat`). The exit code of the whole
is that of the first process that failed: 2 for a user's error, 128 + the signal's number for one
that was killed, :data:`.heartbeat.EXIT_HUNG` if one hung, :data:`.stopping.EXIT_RESUME` if all
stopped in order to be resumed.
"""

import argparse
import contextlib
import datetime
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from types import FrameType

import torch
from detectron2.utils import comm
from torch import distributed as dist
from torch.multiprocessing import start_processes

from ..errors import UserError, exit_on_user_error
from .heartbeat import COLLECTIVE_TIMEOUT, EXIT_HUNG, Heartbeat, set_heartbeat
from .layout import Layout, layout_from_arguments, layout_from_environment
from .stopping import EXIT_RESUME, SAME_SIGNAL_SECONDS

# Seconds that all processes of all machines may take to start.
START_TIMEOUT = 600
# Seconds for the others to end after one failed, before they are killed.
GRACE = 5
# Seconds for the others to end after one ended as it should; they end together.
ORDERLY_GRACE = 60
# Seconds in which other processes may find the same mistake as this one.
SAME_ERROR_SECONDS = 2
# Seconds in which the launching process learns that a child was killed.
KILLED_SECONDS = 0.5
EXIT_USER_ERROR = 2


Main = Callable[[argparse.Namespace], None]


def launch(main: Main, args: argparse.Namespace, start_method: str = "spawn") -> None:
    """Run ``main(args)`` in as many processes as ``args`` or the environment say.

    ``main`` raises :class:`~ddetr_d2.errors.UserError` for what the user can mend; it is printed
    once, whichever and however many processes raise it.

    Args:
        main: function that the processes can import.
        args: of :func:`.layout.launch_argument_parser`.
        start_method: of :mod:`multiprocessing`.

    Raises:
        SystemExit: with the exit code of the whole, unless that is 0.
    """
    with exit_on_user_error():
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            layout = layout_from_environment(args)
            code = _run_from_environment(main, args, layout)
        else:
            layout = layout_from_arguments(args)
            if layout.world_size == 1:
                code = _run_alone(main, args)
            else:
                code = _run_children(main, args, layout, start_method)
    if code:
        sys.exit(code)


def _run_from_environment(main: Main, args: argparse.Namespace, layout: Layout) -> int:
    try:
        # torchrun has a store already, otherwise that of rank 0 is started.
        store, rank, _ = next(dist.rendezvous("env://", timeout=_seconds(START_TIMEOUT)))
    except dist.DistError as error:
        address = " and ".join(f"{n} {os.environ[n]}" for n in ("MASTER_ADDR", "MASTER_PORT"))
        raise UserError(f"{address} cannot be used: {error}") from error
    return _run(main, args, layout, store, rank)


def _run_alone(main: Main, args: argparse.Namespace) -> int:
    try:
        main(args)
    except KeyboardInterrupt:
        print("error: interrupted.", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _run_children(main: Main, args: argparse.Namespace, layout: Layout, start_method: str) -> int:
    host, port = layout.address
    # The store lives in this process, so that it outlives any of the children.
    is_first = layout.machine_rank == 0
    store = _connect(host, port, is_server=is_first)
    context = start_processes(
        _child,
        (main, args, layout, (host, store.port), multiprocessing.get_start_method()),
        nprocs=layout.local_size,
        join=False,
        start_method=start_method,
    )
    return _wait_for(context.processes, layout, dist.PrefixStore("failures", store))


def _connect(host: str, port: int, is_server: bool) -> dist.TCPStore:
    try:
        return dist.TCPStore(
            host,
            port,
            is_master=is_server,
            timeout=_seconds(START_TIMEOUT),
            wait_for_workers=False,
        )
    except dist.DistError as error:
        if is_server:
            raise UserError(f"--dist-url tcp://{host}:{port}: the port is in use.") from error
        raise UserError(
            f"--dist-url tcp://{host}:{port}: the first machine does not answer."
        ) from error


def _child(
    local_rank: int,
    main: Main,
    args: argparse.Namespace,
    layout: Layout,
    address: tuple[str, int],
    start_method: str,
) -> None:
    # That of a spawned process is to spawn. Its data workers are to be started as in any other
    # run: forked on Linux, they share 400 MB each with it.
    multiprocessing.set_start_method(start_method, force=True)
    rank = layout.machine_rank * layout.local_size + local_rank
    try:
        code = _run(main, args, layout, _connect(*address, is_server=False), rank)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    sys.exit(code)


def _run(main: Main, args: argparse.Namespace, layout: Layout, store: dist.Store, rank: int) -> int:
    """Run ``main(args)`` as process ``rank``; returns the exit code."""
    heartbeat = Heartbeat(store, rank, layout.world_size, args.hang_limit)
    failures = dist.PrefixStore("failures", store)
    try:
        missing = heartbeat.wait_for_all(START_TIMEOUT)
        if missing:
            raise UserError(
                f"rank {', '.join(map(str, missing))} of {layout.world_size} did not start within "
                f"{START_TIMEOUT} s."
            )
        heartbeat.start()
        set_heartbeat(heartbeat)
        _join_process_group(layout, store, rank)
        try:
            main(args)
            code = 0
        except SystemExit as end:
            if end.code != EXIT_RESUME:
                raise
            code = EXIT_RESUME
        # Together, as the first that is gone ends the others where it was not awaited.
        comm.synchronize()
        dist.destroy_process_group()
        return code
    except UserError as error:
        _is_first(failures)
        _print_once(failures, rank, layout.world_size, str(error))
        return EXIT_USER_ERROR
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except Exception as error:
        # The connection to a process that was killed is lost before anybody else knows of it.
        time.sleep(KILLED_SECONDS)
        if _is_first(failures):
            print(f"rank {rank} of {layout.world_size}:", file=sys.stderr)
            traceback.print_exc()
        else:  # most likely because the first is gone
            text = " ".join(str(error).split())
            print(f"rank {rank} failed too: {type(error).__name__}: {text}", file=sys.stderr)
        return 1
    finally:
        heartbeat.stop()
        set_heartbeat(None)


def _join_process_group(layout: Layout, store: dist.Store, rank: int) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        # Slurm binds each task to cores of its own.
        own = os.environ.get("SLURM_CPUS_PER_TASK") if "RANK" in os.environ else None
        cores = int(own or len(os.sched_getaffinity(0)) // layout.local_size)
        torch.set_num_threads(max(1, cores))
    if layout.backend == "nccl":
        # Slurm may show each process its own GPU alone.
        torch.cuda.set_device(rank % layout.local_size % torch.cuda.device_count())
    dist.init_process_group(
        layout.backend,
        store=store,
        rank=rank,
        world_size=layout.world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    comm.create_local_process_group(layout.local_size)
    comm.synchronize()


def _is_first(failures: dist.Store) -> bool:
    """Count one more failure, and say whether it is the first of the run."""
    try:
        return failures.add("count", 1) == 1
    except RuntimeError:  # the store is gone
        return True


def _print_once(failures: dist.Store, rank: int, world_size: int, message: str) -> None:
    """Print a user's error: without ranks if all processes have it, once in any case."""
    sys.stdout.flush()
    ranks = [rank]
    try:
        failures.set(f"error/{rank}", message)
        keys = [f"error/{r}" for r in range(world_size)]
        end = time.monotonic() + SAME_ERROR_SECONDS
        while not failures.check(keys) and time.monotonic() < end:
            time.sleep(0.05)
        ranks = [
            r
            for r, key in enumerate(keys)
            if failures.check([key]) and failures.get(key) == message.encode()
        ]
        if failures.add(f"printed/{message}", 1) > 1:
            return
    except RuntimeError:  # the store is gone
        pass
    which = "" if len(ranks) == world_size else f"rank {', '.join(map(str, ranks))}: "
    print(f"error: {which}{message}", file=sys.stderr, flush=True)


def _wait_for(processes: list[BaseProcess], layout: Layout, failures: dist.Store) -> int:
    """Wait until all children have ended, pass signals on to them; returns the exit code."""
    received: list[float] = []  # times of the signals that are not the same signal once more

    def forward(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number != signal.SIGUSR1 and (not received or now - received[-1] > SAME_SIGNAL_SECONDS):
            received.append(now)
        for process in processes:
            if process.pid is not None and process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    previous = {number: signal.signal(number, forward) for number in numbers}
    first_rank = layout.machine_rank * layout.local_size
    ranks = {process.sentinel: first_rank + i for i, process in enumerate(processes)}
    alive = {process.sentinel: process for process in processes}
    failed: tuple[int, int] | None = None  # rank and exit code of the first
    code, kill_at, killed, did_not_end = 0, float("inf"), False, False
    try:
        while alive:
            # Half a second, for a signal does not end the waiting.
            ended = multiprocessing.connection.wait([*alive], 0.5)
            for sentinel in [sentinel for sentinel in alive if sentinel in ended]:
                process = alive.pop(sentinel)
                process.join()
                assert process.exitcode is not None  # after join
                if process.exitcode in (0, EXIT_RESUME):
                    code = code or process.exitcode
                    kill_at = min(kill_at, time.monotonic() + ORDERLY_GRACE)
                elif failed is None:
                    failed, did_not_end = (ranks[sentinel], process.exitcode), killed
                    kill_at = min(kill_at, time.monotonic() + GRACE)
                    if process.exitcode < 0:  # it could not say so itself
                        _is_first(failures)
            if len(received) > 1:
                kill_at = min(kill_at, received[1] + GRACE)
            if time.monotonic() > kill_at and not killed:
                killed = True
                for process in alive.values():
                    process.kill()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if failed is None:
        return code
    if not received:
        _say_who_failed(*failed, layout.world_size, did_not_end)
    return failed[1] if failed[1] > 0 else 128 - failed[1]


def _say_who_failed(rank: int, code: int, world_size: int, did_not_end: bool) -> None:
    if code in (EXIT_USER_ERROR, EXIT_HUNG):  # said already
        return
    if did_not_end:
        how = f"did not end within {ORDERLY_GRACE} s after the others and was killed"
    elif code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            how += ", as the system does when memory runs out"
    else:
        how = f"failed with exit code {code}"
    print(f"error: rank {rank} of {world_size} {how}; the run was ended.", file=sys.stderr)


def _seconds(number: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=number)
