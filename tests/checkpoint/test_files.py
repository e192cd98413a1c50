"""Files of weights are read without running anything that is in them."""

import collections
import json
import os
import pickle
import shutil

from ddetr_d2.checkpoint.files import read_file
from ddetr_d2.errors import UserError

import numpy as np
import pytest
import torch
from safetensors.torch import save_file


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Harmless:
    """An object that does nothing, but is no weight."""


def torch_file(content, path):
    torch.save(content, path)


def old_torch_file(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


def pickle_file(content, path):
    path.write_bytes(pickle.dumps(content, protocol=2))


WRITERS = [torch_file, old_torch_file, pickle_file]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", ["x.pth", "x.pkl", "x.bin"])
def test_code_in_a_file_is_not_run(write, name, tmp_path):
    mark = tmp_path / "mark"
    write({"model": {"a": 1}, "trap": Evil(mark)}, tmp_path / name)
    with pytest.raises(UserError, match="mkdir.*could run any program.*--allow-pickle"):
        read_file(str(tmp_path / name))
    assert not mark.exists()


@pytest.mark.parametrize("write", WRITERS)
def test_objects_are_read_with_permission(write, tmp_path):
    write({"a": Harmless(), "b": 1}, tmp_path / "x")
    with pytest.raises(UserError, match="Harmless"):
        read_file(str(tmp_path / "x"))
    content = read_file(str(tmp_path / "x"), allow_pickle=True)
    assert isinstance(content["a"], Harmless)


@pytest.mark.parametrize("module", ["builtins", "numpy", "numpy.core", "os", "torch.storage"])
@pytest.mark.parametrize("name", ["eval", "load", "system", "_load_from_bytes", "getattr"])
def test_pickles_reach_no_function(module, name, tmp_path):
    (tmp_path / "x.pkl").write_bytes(f"c{module}\n{name}\n(S'1'\ntR.".encode())
    with pytest.raises(UserError, match=f"{module}.{name}"):
        read_file(str(tmp_path / "x.pkl"))


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_all_pickle_protocols(protocol, tmp_path):
    content = collections.OrderedDict(
        a=np.arange(6, dtype="f4").reshape(2, 3), b=np.float32(3), c=["d", {"e": (1, None)}]
    )
    (tmp_path / "x").write_bytes(pickle.dumps(content, protocol=protocol))
    loaded = read_file(str(tmp_path / "x"))
    np.testing.assert_array_equal(loaded["a"], content["a"])
    assert (loaded["b"], loaded["c"]) == (content["b"], content["c"])


def test_array_of_older_numpy(tmp_path):
    pickled = pickle.dumps(np.zeros(3), protocol=2).replace(b"numpy._core", b"numpy.core")
    (tmp_path / "x").write_bytes(pickled)
    np.testing.assert_array_equal(read_file(str(tmp_path / "x")), np.zeros(3))


def test_kinds_are_told_by_contents(tmp_path):
    state = {"a": torch.arange(3.0)}
    for number, write in enumerate((*WRITERS[:2], save_file)):
        write(state, tmp_path / f"{number}.txt")
        assert torch.equal(read_file(str(tmp_path / f"{number}.txt"))["a"], state["a"])


@pytest.mark.parametrize("size", [4, 12, 100, 1500])
@pytest.mark.parametrize("write", [*WRITERS, save_file])
def test_truncated_files(write, size, tmp_path):
    write({"a": torch.zeros(999)} if write is not pickle_file else np.zeros(999), tmp_path / "x")
    content = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(content[:size])
    with pytest.raises(UserError, match="cannot be read as weights.*damaged"):
        read_file(str(tmp_path / "x"))


@pytest.mark.parametrize("index", [{}, {"weight_map": 3}, {"weight_map": {"a": "../secret"}}])
def test_indices_that_are_none(index, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "secret")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="no index of weights"):
        read_file(str(folder / "model.safetensors.index.json"))
    shutil.copy(tmp_path / "secret", folder / "part")
    index = {"weight_map": {"a": "part"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_file(str(folder / "model.safetensors.index.json")).keys() == {"a"}
