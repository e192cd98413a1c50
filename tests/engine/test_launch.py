"""Runs of two real processes: how they end, and what they say, whatever happens to them."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from ddetr_d2.engine.launch import launch
from ddetr_d2.engine.layout import launch_argument_parser
from ddetr_d2.engine.stopping import RunStopped, StopRequest
from ddetr_d2.errors import UserError

import pytest
import torch
from detectron2.utils import comm
from torch import distributed as dist

from ..conftest import ROOT
from .conftest import TIME_LIMIT


def sum_of_ranks(args) -> None:
    total = torch.tensor(comm.get_rank() + 1)
    dist.all_reduce(total)
    text = f"{total} {comm.get_local_rank()} {comm.get_local_size()} {dist.get_backend()}"
    Path(args.opts[0], str(comm.get_rank())).write_text(text)


def test_processes_work_together(run, tmp_path):
    assert run(sum_of_ranks).exit_code() == 0
    assert (tmp_path / "0").read_text() == "3 0 2 gloo"
    assert (tmp_path / "1").read_text() == "3 1 2 gloo"


def threads(args) -> None:
    Path(args.opts[0], str(comm.get_rank())).write_text(str(torch.get_num_threads()))


@pytest.mark.parametrize("chosen", [None, "3"])
def test_processes_divide_the_cores(run, tmp_path, monkeypatch, chosen):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(10))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    assert run(threads).exit_code() == 0
    expected = str(torch.get_num_threads()) if chosen else "5"
    assert [(tmp_path / rank).read_text() for rank in "01"] == [expected] * 2


def rank_1_raises(args) -> None:
    if comm.get_rank() == 1:
        raise ArithmeticError("one of them")
    comm.synchronize()


def test_exception_ends_all_and_is_shown_with_its_rank(run):
    started = run(rank_1_raises)
    assert started.exit_code() == 1
    assert "rank 1 of 2:\nTraceback" in started.log()
    assert started.log().count("Traceback") == 1
    assert started.log().endswith(
        "error: rank 1 of 2 failed with exit code 1; the run was ended.\n"
    )


def rank_1_is_killed(args) -> None:
    if comm.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if Path(args.opts[0], "unaware").exists():
        time.sleep(TIME_LIMIT)
    comm.synchronize()


@pytest.mark.parametrize("unaware", [False, True])
def test_killed_process_ends_all(run, tmp_path, unaware):
    if unaware:
        (tmp_path / "unaware").touch()
    started = run(rank_1_is_killed)
    assert started.exit_code() == 128 + signal.SIGKILL
    assert "error: rank 1 of 2 was killed by SIGKILL" in started.log().splitlines()[-1]
    assert "Traceback" not in started.log()
    if not unaware:
        assert "rank 0 failed too: RuntimeError" in started.log()


def rank_1_exits(args) -> None:
    if comm.get_rank() == 1:
        sys.exit(3)
    comm.synchronize()


def test_exit_code_of_the_first_that_failed(run):
    assert run(rank_1_exits).exit_code() == 3


def same_error(args) -> None:
    raise UserError("no such file.")


def different_errors(args) -> None:
    raise UserError(f"no such file: {'ab'[comm.get_rank()]}.")


def error_of_rank_1(args) -> None:
    if comm.get_rank() == 1:
        raise UserError("no such file.")
    comm.synchronize()


@pytest.mark.parametrize(
    ("main", "errors"),
    [
        (same_error, ["error: no such file."]),
        (
            different_errors,
            ["error: rank 0: no such file: a.", "error: rank 1: no such file: b."],
        ),
        (error_of_rank_1, ["error: rank 1: no such file."]),
    ],
)
def test_user_error_stands_once(run, main, errors):
    started = run(main)
    assert started.exit_code() == 2
    lines = started.log().splitlines()
    assert sorted(line for line in lines if line.startswith("error: ")) == errors
    assert "Traceback" not in started.log()


def train_until_stopped(args) -> None:
    folder, rank = Path(args.opts[0]), comm.get_rank()
    with StopRequest() as stop:
        for number in range(10000):
            time.sleep(0.01)
            (folder / f"started{rank}").touch()
            if stop.requested():
                if rank == 0:  # slower than the other
                    time.sleep(0.3)
                (folder / f"stopped{rank}").write_text(f"{number} {stop.reason}")
                raise RunStopped


def rank_0_is_slower(args) -> None:
    pid = Path(args.opts[0], "pid")
    if comm.get_rank() == 1:
        pid.with_suffix(".new").write_text(str(os.getpid()))
        pid.with_suffix(".new").rename(pid)
        raise RunStopped
    while not pid.exists():
        time.sleep(0.05)
    time.sleep(0.5)
    assert Path("/proc", pid.read_text(), "stat").read_text().split()[2] != "Z", "has ended"
    raise RunStopped


def test_processes_end_together(run):
    """Otherwise torchrun would end the one that is still writing a checkpoint."""
    assert run(rank_0_is_slower).exit_code() == os.EX_TEMPFAIL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("to_all", [False, True], ids=["to parent", "to all"])
def test_signal_stops_all_after_the_same_step(run, tmp_path, number, to_all):
    started = run(train_until_stopped)
    started.wait_for_files("started0", "started1")
    (os.killpg if to_all else os.kill)(started.process.pid, number)
    assert started.exit_code() == os.EX_TEMPFAIL, started.log()
    stopped = [(tmp_path / f"stopped{rank}").read_text() for rank in (0, 1)]
    assert stopped[0] == stopped[1]
    assert stopped[0].endswith(number.name)
    assert "error" not in started.log()


def test_signal_to_one_child_stops_all(run, tmp_path):
    started = run(train_until_stopped)
    started.wait_for_files("started0", "started1")
    child = max(pid for pid in started.processes() if pid != started.process.pid)
    os.kill(child, signal.SIGTERM)
    assert started.exit_code() == os.EX_TEMPFAIL, started.log()


def test_children_stop_when_the_parent_is_killed(run, tmp_path):
    started = run(train_until_stopped)
    started.wait_for_files("started0", "started1")
    os.kill(started.process.pid, signal.SIGKILL)
    started.process.join()
    end = time.monotonic() + TIME_LIMIT
    while started.processes():
        assert time.monotonic() < end
        time.sleep(0.1)
    assert (tmp_path / "stopped0").exists() and (tmp_path / "stopped1").exists()


def long_step(args) -> None:
    with StopRequest():
        Path(args.opts[0], f"started{comm.get_rank()}").touch()
        for _ in range(10 * TIME_LIMIT):
            time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_at_once(run, number):
    started = run(long_step)
    started.wait_for_files("started0", "started1")
    for _ in range(2):
        os.kill(started.process.pid, number)
        time.sleep(1.2)
    assert started.exit_code() == 128 + number
    assert "Traceback" not in started.log()


def rank_1_raises_if_told(args) -> None:
    sum_of_ranks(args)
    if Path(args.opts[0], "raise").exists():
        rank_1_raises(args)


@pytest.mark.parametrize("fails", [False, True])
def test_two_machines(run, tmp_path, fails):
    if fails:
        (tmp_path / "raise").touch()
    arguments = ["--num-processes", "1", "--num-machines", "2", "--hang-limit", "1"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        arguments += ["--dist-url", f"tcp://127.0.0.1:{server.getsockname()[1]}"]
    machines = [
        run(rank_1_raises_if_told, *arguments, "--machine-rank", rank) for rank in ("1", "0")
    ]
    assert [machine.exit_code() for machine in machines] == ([1, 1] if fails else [0, 0])
    assert (tmp_path / "0").read_text() == "3 0 1 gloo"
    assert (tmp_path / "1").read_text() == "3 0 1 gloo"
    if fails:
        assert machines[0].log().count("Traceback") == 1
        assert "rank 1 of 2:\nTraceback" in machines[0].log()


SCRIPT = """
import multiprocessing
import sys
from pathlib import Path
from ddetr_d2.engine.launch import launch
from ddetr_d2.engine.layout import launch_argument_parser
from ddetr_d2.errors import UserError
from detectron2.utils import comm

def main(args):
    folder = Path(args.opts[0])
    place = f"{comm.get_rank()} of {comm.get_world_size()}, {comm.get_local_rank()}"
    (folder / place).write_text(multiprocessing.get_start_method())
    if len(args.opts) > 1:
        raise UserError(args.opts[1])

if __name__ == "__main__":
    launch(main, launch_argument_parser().parse_args())
"""


@pytest.mark.parametrize(
    "command",
    [
        ["SCRIPT", "--num-processes", "2"],
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "SCRIPT"],
    ],
    ids=["spawn", "torchrun"],
)
def test_program(command, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [str(script) if word == "SCRIPT" else word for word in command]
    done = subprocess.run(
        [sys.executable, *command, str(tmp_path), "no such file."],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=2 * TIME_LIMIT,
    )
    assert done.returncode == (1 if "-m" in command else 2), done.stderr  # torchrun has one code
    assert done.stderr.count("no such file.") == 1
    assert "error: no such file.\n" in done.stderr
    for place in ("0 of 2, 0", "1 of 2, 1"):  # data workers are started as everywhere
        assert (tmp_path / place).read_text() == multiprocessing.get_start_method()


def test_one_process_runs_in_this_one(tmp_path):
    seen = []
    launch(lambda args: seen.append(os.getpid()), launch_argument_parser().parse_args([]))
    assert seen == [os.getpid()]


def test_port_in_use(capsys):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(SystemExit, match="2"):
            launch(
                sum_of_ranks,
                launch_argument_parser().parse_args(["--num-processes", "2", "--dist-url", url]),
            )
    assert capsys.readouterr().err == f"error: --dist-url {url}: the port is in use.\n"
