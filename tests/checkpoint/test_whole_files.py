"""Files that appear whole or not at all, and damage that is found."""

import errno
import io
import itertools
import multiprocessing
import os
import re
import resource
import time

from ddetr_d2.checkpoint.whole_files import (
    find_damage,
    remove_partial_files,
    save_whole,
    whole_file,
)
from ddetr_d2.errors import UserError

import pytest
import torch

CONTENT = {"model": {"a": torch.arange(5.0), "b": torch.ones(3)}, "iteration": 7}


def equal(content):
    tensors = [torch.equal(content["model"][name], CONTENT["model"][name]) for name in "ab"]
    return all(tensors) and content["iteration"] == 7


def test_what_is_saved_is_read_back_and_whole(tmp_path):
    path = str(tmp_path / "a.pth")
    save_whole(CONTENT, path)
    assert equal(torch.load(path, weights_only=True))
    assert find_damage(path) == ""
    assert os.listdir(tmp_path) == ["a.pth"]


def test_a_changed_bit_is_found_or_harmless(tmp_path):
    path = tmp_path / "a.pth"
    save_whole(CONTENT, str(path))
    good = path.read_bytes()
    for place in range(0, len(good), 3):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        if not find_damage(str(path)):  # in the space between the parts, a date and the like
            assert equal(torch.load(path, weights_only=True)), place
    for name, tensor in CONTENT["model"].items():
        place = good.index(tensor.numpy().tobytes())
        for byte in range(place, place + tensor.nbytes):
            path.write_bytes(good[:byte] + bytes([good[byte] ^ 255]) + good[byte + 1 :])
            assert "checksum" in find_damage(str(path)), (name, byte)


def test_a_file_cut_short_is_found(tmp_path):
    path = tmp_path / "a.pth"
    save_whole(CONTENT, str(path))
    good = path.read_bytes()
    for size in [*range(0, len(good) - 100, 7), *range(len(good) - 100, len(good))]:
        path.write_bytes(good[:size])
        assert find_damage(str(path)), size
    path.write_bytes(bytes(len(good)))  # as some file systems leave it after a loss of power
    assert find_damage(str(path))


def test_words_for_damage(tmp_path):
    path = tmp_path / "a.pth"
    assert find_damage(str(path)) == "does not exist"
    path.touch()
    assert find_damage(str(path)) == "is empty"
    path.write_bytes(b"PK\3\4 and so on")
    assert find_damage(str(path)) == "is cut short or damaged"


def test_files_without_checksums_pass(tmp_path):
    path = str(tmp_path / "old.pth")
    torch.save(CONTENT, path, _use_new_zipfile_serialization=False)
    assert find_damage(path) == ""


def test_an_error_while_writing_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("before")
    with pytest.raises(RuntimeError), whole_file(str(path)) as file:
        file.write(b"after")
        raise RuntimeError
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_full_disk_that_shows_when_the_file_is_flushed(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "a.txt"
    path.write_text("before")
    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(
        UserError, match=r"No space left on device \(.* MB free there\)\. Free some"
    ):
        with whole_file(str(path)) as file:
            file.write(b"after")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_keyboard_interrupt_within_the_writer(tmp_path, monkeypatch):
    class Interrupted(io.BytesIO):
        writes = 0

        def write(self, data):
            self.writes += 1
            if self.writes == 5:
                raise KeyboardInterrupt
            return super().write(data)

        def fileno(self):
            raise AssertionError("goes on to its end")

    monkeypatch.setattr("builtins.open", lambda *args: Interrupted())
    with pytest.raises(KeyboardInterrupt):
        save_whole(CONTENT, str(tmp_path / "a.pth"))


def test_folder_that_is_gone_or_no_folder(tmp_path):
    with pytest.raises(UserError, match="gone/a.pth cannot be written: No such file.*bring it bac"):
        save_whole(CONTENT, str(tmp_path / "gone" / "a.pth"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file/a.pth cannot be written: Not a directory"):
        save_whole(CONTENT, str(tmp_path / "file" / "a.pth"))


# Made before a process is forked: computing in one can wait for ever for the threads of the other.
TENSORS = {str(number): torch.ones(20_000) for number in range(8)}


def child(function, *arguments):
    """A process forked from this one, which spares the imports."""
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    return process


def save_on_full_disk(folder, size):
    """A limit of the size of a file stands for a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        save_whole({"model": TENSORS}, f"{folder}/a.pth")
    except UserError as error:
        os._exit(0 if re.fullmatch(f"{folder}/a.pth cannot be {FULL}", str(error)) else 1)
    os._exit(2)


FULL = (
    r"written: File too large \([\d,.]+ MB free there\)\. "
    r"Raise the limit of the size of a file \(ulimit -f\)\."
)


@pytest.mark.parametrize("size", [0, 100, 300_000])
def test_full_disk(size, tmp_path, capfd):
    save_whole(CONTENT, str(tmp_path / "a.pth"))
    process = child(save_on_full_disk, tmp_path, size)
    process.join(60)
    assert process.exitcode == 0
    assert capfd.readouterr().err == ""
    assert os.listdir(tmp_path) == ["a.pth"]
    assert equal(torch.load(tmp_path / "a.pth", weights_only=True))


def save_again_and_again(folder):
    for number in itertools.count():
        save_whole({"model": TENSORS, "iteration": number}, f"{folder}/a.pth")


def test_killed_while_it_writes(tmp_path):
    """Whenever the process dies, what bears the name is whole; what else is left is removed."""
    left = attempt = 0
    while attempt < 8 or not left:  # at least once in the middle of a file
        process = child(save_again_and_again, tmp_path)
        while not (tmp_path / "a.pth").exists():
            assert process.is_alive()
        time.sleep(0.0037 * attempt)
        process.kill()
        process.join()
        assert find_damage(str(tmp_path / "a.pth")) == ""
        left += len(os.listdir(tmp_path)) - 1
        remove_partial_files(str(tmp_path))
        assert os.listdir(tmp_path) == ["a.pth"]
        os.unlink(tmp_path / "a.pth")
        attempt += 1
        assert attempt < 100
