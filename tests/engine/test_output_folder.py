"""The folder of a run: writable, of one run at a time, large enough."""

import errno
import logging
import multiprocessing
import os
import shutil
import sys
import time
from collections import namedtuple

from ddetr_d2.checkpoint.whole_files import PARTIAL
from ddetr_d2.engine.output_folder import check_disk_space, checkpoint_bytes, output_folder
from ddetr_d2.errors import UserError

import pytest
import torch

FORK = multiprocessing.get_context("fork")


def test_makes_the_folder_and_leaves_no_more_than_a_lock(tmp_path):
    folder = tmp_path / "new" / "run"
    with output_folder(str(folder)):
        assert os.listdir(folder) == [".lock"]
        assert (folder / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    with output_folder(str(folder)):  # and again
        pass


def test_removes_what_a_killed_process_left(tmp_path):
    ours, theirs = tmp_path / f".model.pth.1{PARTIAL}", tmp_path / ".model.pth.1.tmp"
    ours.touch()
    theirs.touch()
    with output_folder(str(tmp_path)):
        assert not ours.exists() and theirs.exists()


def test_no_folder(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "file/run"):
        with pytest.raises(UserError, match=f"OUTPUT_DIR .*/{name} is a file or lies in one"):
            with output_folder(str(tmp_path / name)):
                pass
    with pytest.raises(UserError, match="OUTPUT_DIR '' cannot be written"):
        with output_folder(""):
            pass


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.EROFS, "Read-only file system .* Make the disk writable"),
        (errno.EACCES, "Permission denied .* Make the folder writable"),
        (errno.ENOSPC, "No space left on device .* Free some space"),
        (errno.EDQUOT, "Disk quota exceeded .* within your quota"),
        (errno.EIO, "Input/output error .* Check the disk"),
    ],
)
def test_folder_that_cannot_be_written(number, words, tmp_path, monkeypatch):
    def refuse(**kwargs):
        raise OSError(number, os.strerror(number))

    # Permissions do not stop a test that is run by root.
    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    with pytest.raises(UserError, match=f"OUTPUT_DIR '{tmp_path}' cannot be written: {words}"):
        with output_folder(str(tmp_path)):
            pass


def train_with_a_data_worker(folder, pipe):
    with output_folder(str(folder)):
        worker = FORK.Process(target=time.sleep, args=(60,))
        worker.start()
        pipe.send(worker.pid)
        time.sleep(60)


def test_two_runs_in_one_folder(tmp_path):
    """The lock ends with the process that has it, even if its data workers live a while longer."""
    ours, theirs = FORK.Pipe()
    first = FORK.Process(target=train_with_a_data_worker, args=(tmp_path, theirs))
    first.start()
    worker = ours.recv()
    message = f"process {first.pid} on .* is training in OUTPUT_DIR {tmp_path}; give another"
    with pytest.raises(UserError, match=message), output_folder(str(tmp_path)):
        pass
    with pytest.raises(UserError, match=message), output_folder(str(tmp_path)):  # still there
        pass
    first.kill()
    first.join()
    with output_folder(str(tmp_path)):
        os.kill(worker, 9)  # it lived until now


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_systems_without_locks(number, tmp_path, monkeypatch, caplog):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    partial = tmp_path / f".model.pth.1{PARTIAL}"
    partial.touch()
    monkeypatch.setattr("fcntl.lockf", refuse)
    with output_folder(str(tmp_path)):
        assert "without locks" in caplog.text
        assert partial.exists()  # another run may be writing it


def test_systems_without_locks(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as if it were not there
    with output_folder(str(tmp_path)):
        assert "no locks of files" in caplog.text


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW,
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1),
    ],
)
def test_size_of_a_checkpoint(optimizer, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.BatchNorm1d(300))
    model[0].bias.requires_grad_(False)
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad])
    estimate = checkpoint_bytes(model, optimizer)
    model(torch.randn(4, 300)).sum().backward()
    optimizer.step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(content, tmp_path / "a.pth")
    size = (tmp_path / "a.pth").stat().st_size
    assert abs(estimate - size) < 5000
    weights = checkpoint_bytes(model, optimizer, copies=1) - estimate
    assert abs(weights - 4 * (300 * 300 + 5 * 300)) < 100


def free(monkeypatch, gigabytes):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(0, 0, int(gigabytes * 1e9)))


GB = 10**9


@pytest.mark.parametrize(
    "options, gigabytes",
    [
        (dict(iterations=range(100), period=10), 11),  # the tenth and the final one
        (dict(iterations=range(100), period=10, best=True), 13),
        (dict(iterations=range(100), period=10, keep=3), 5),  # 3, the final one, one written
        (dict(iterations=range(100), period=10, keep=30), 12),
        (dict(iterations=range(100), period=30), 4),
        (dict(iterations=range(50, 100), period=30), 3),
        (dict(iterations=range(5), period=10), 1),
    ],
)
def test_disk_space_for_all_checkpoints(options, gigabytes, tmp_path, monkeypatch, caplog):
    free(monkeypatch, gigabytes + 0.01)
    check_disk_space(str(tmp_path), GB, **options)
    assert not caplog.records
    free(monkeypatch, gigabytes - 0.01)
    if gigabytes > 2:
        check_disk_space(str(tmp_path), GB, **options)
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert f"{gigabytes - 0.01:.2f} GB are free in OUTPUT_DIR {tmp_path}" in record.message
        assert (
            f"will write {gigabytes}.00 GB ({gigabytes} checkpoints of 1.00 GB)" in record.message
        )
    free(monkeypatch, min(gigabytes, 2) - 0.01)
    with pytest.raises(UserError, match=f"too few for {min(gigabytes, 2)} checkpoints of 1.00 GB"):
        check_disk_space(str(tmp_path), GB, **options)


def test_checkpoints_that_make_room(tmp_path, monkeypatch, caplog):
    for iteration in (9, 19, 29):
        (tmp_path / f"model_{iteration:07d}.pth").touch()
    free(monkeypatch, 2.01)
    check_disk_space(str(tmp_path), GB, iterations=range(30, 100), period=10, keep=3)
    assert not caplog.records


def test_nothing_is_needed_after_the_end(tmp_path, monkeypatch):
    free(monkeypatch, 0)
    check_disk_space(str(tmp_path), GB, iterations=range(100, 100), period=10)
