"""Arguments and environment variables from which no run can be started."""

import re
import shlex

from ddetr_d2.engine.layout import (
    Layout,
    launch_argument_parser,
    layout_from_arguments,
    layout_from_environment,
)
from ddetr_d2.errors import UserError

import pytest

from ..conftest import ROOT


def parse(arguments: str):
    return launch_argument_parser().parse_args(arguments.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--num-gpus 2 --num-processes 2", "give one of them"),
        ("--num-gpus 1000", "--num-gpus 1000, but this machine has"),
        ("--num-gpus 0", "--num-gpus 0; expected at least 1"),
        ("--num-processes -1", "--num-processes -1; expected at least 1"),
        ("--num-processes 1 --num-machines 2", "--dist-url auto is for one machine"),
        ("--num-processes 1 --machine-rank 1", "--machine-rank 1 with --num-machines 1"),
        ("--num-processes 2 --dist-url file:///tmp/x", "expected auto or tcp://HOST:PORT"),
        ("--num-processes 2 --dist-url tcp://host:99999", "expected auto or tcp://HOST:PORT"),
        ("--num-processes 2 --hang-limit 0", "--hang-limit 0"),
    ],
)
def test_arguments_that_do_not_work(arguments, message):
    with pytest.raises(UserError, match=message):
        layout_from_arguments(parse(arguments))


def test_processes_on_two_machines():
    arguments = "--num-processes 3 --num-machines 2 --machine-rank 1 --dist-url tcp://first:1234"
    layout = layout_from_arguments(parse(arguments))
    assert layout == Layout(3, 2, 1, "gloo", ("first", 1234))
    assert layout.world_size == 6


TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "first",
    "MASTER_PORT": "1234",
}


def test_environment(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    layout = layout_from_environment(parse("--num-processes 2"))
    assert layout == Layout(2, machines=2, machine_rank=1, backend="gloo")


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"LOCAL_RANK": "", "MASTER_PORT": ""}, "", "but not LOCAL_RANK, MASTER_PORT"),
        ({"RANK": "three"}, "", "must be numbers"),
        ({"WORLD_SIZE": "5"}, "", "do not go together"),
        ({"LOCAL_RANK": "0"}, "", "do not go together"),
        ({"LOCAL_WORLD_SIZE": "0"}, "", "do not go together"),
        ({}, "--num-processes 3", "--num-processes 3, but 2 processes were started"),
    ],
)
def test_environment_that_does_not_work(monkeypatch, changes, arguments, message):
    for name, value in {**TORCHRUN, **changes}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        layout_from_environment(parse(arguments))


def commands_of_the_docs():
    text = (ROOT / "docs" / "training.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"train_net\.py (--config-file .*?)['`]?$", text, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_commands_of_the_docs():
    """Options after the first KEY would be taken for keys."""
    commands = commands_of_the_docs()
    assert len(commands) > 6
    for command in commands:
        args = launch_argument_parser().parse_args(command)
        assert (ROOT / args.config_file).is_file()
        assert not [word for word in args.opts if word.startswith("-")], command
