"""Reading files of weights without running what may be in them."""

import argparse
import collections
import json
import os
import pickle
import re
import struct
from typing import Any, BinaryIO

import numpy as np
import torch
from detectron2.utils.file_io import PathManager
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import UserError
from . import hub  # noqa: F401  hf:// paths

# The weights in a folder of Hugging Face transformers, the first of them that is there.
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# First bytes of files that torch.save wrote: a ZIP archive; before torch 1.6 a pickled number.
_TORCH_SIGNATURES = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
# What reading a damaged or foreign file raises.
_DAMAGED = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    MemoryError,
    struct.error,
    pickle.UnpicklingError,
    SafetensorError,
)


class _ForbiddenObjects(Exception):
    """A pickle names something that is no plain value; ``args[0]`` is its name."""


def _encode(text: str, encoding: str) -> bytes:
    """How older pickles spell bytes."""
    if encoding != "latin1":
        raise _ForbiddenObjects(f"_codecs.encode to {encoding}")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Knows NumPy arrays and plain containers, and nothing that could do any harm."""

    _KNOWN = {
        ("multiarray", "_reconstruct"): np.zeros(1).__reduce__()[0],
        ("multiarray", "scalar"): np.float32(1).__reduce__()[0],
        ("numeric", "_frombuffer"): np.zeros(1).__reduce_ex__(5)[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        short = re.sub(r"^numpy\._?core\.(?=\w+$)", "", module)
        try:
            return self._KNOWN[short, name]
        except KeyError:
            raise _ForbiddenObjects(f"{module}.{name}") from None


def local_path(path: str) -> str:
    """The file at ``path`` on this machine, after a download where it is a URL.

    A folder of Hugging Face transformers, or a model on the hub (:mod:`.hub`), stands for the
    weights in it.

    Raises:
        UserError: if there is none.
    """
    path = path.partition("?")[0]  # Detectron2 takes options such as ?matching_heuristics=True
    try:
        local = PathManager.get_local_path(path)
    except UserError:
        raise
    except Exception as error:  # downloads fail in as many ways as there are URLs
        raise UserError(f"weights {path} cannot be fetched: {error}") from error
    if os.path.isdir(local):
        files = [os.path.join(local, name) for name in FOLDER_FILES]
        local = next((file for file in files if os.path.isfile(file)), "")
        if not local:
            raise UserError(
                f"weights {path} are a folder without {' or '.join(FOLDER_FILES[::2])}; name a "
                "folder that transformers has saved, or a file."
            )
    if not os.path.isfile(local):
        raise UserError(f"weights {path} do not exist; check MODEL.WEIGHTS.")
    return local


def read_file(path: str, allow_pickle: bool = False, shown: str = "") -> Any:
    """The content of a file of weights, told by its first bytes whatever it is called.

    Args:
        path: a file of torch.save, safetensors, or a pickle of NumPy arrays as in Detectron2's
            model zoo; or the index of a sharded file of transformers.
        allow_pickle: read objects of all kinds. That runs code from the file: trusted files only.
        shown: what to call the file in messages; ``path`` by default.

    Raises:
        UserError: if it is damaged, or holds other objects than arrays and plain values.
    """
    shown = shown or path
    try:
        with open(path, "rb") as file:
            return _read(file, path, allow_pickle)
    except UserError:
        raise
    except _ForbiddenObjects as error:
        raise _forbidden(shown, str(error)) from error
    except _DAMAGED as error:
        unsafe = re.search(r"(?:GLOBAL|class|type) ([\w.]+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error) and unsafe:
            raise _forbidden(shown, unsafe[1]) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"{shown} cannot be read as weights ({reason}); the file is damaged or of another "
            "kind. Copy or download it again."
        ) from error


def _read(file: BinaryIO, path: str, allow_pickle: bool) -> Any:
    start = file.read(16)
    file.seek(0)
    if start.startswith(_TORCH_SIGNATURES):
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=not allow_pickle)
    if start[8:9] == b"{":  # after the length of the header
        return load_file(path)
    if start.lstrip().startswith(b"{"):
        return _read_shards(json.load(file), os.path.dirname(path), allow_pickle)
    unpickler = pickle.Unpickler if allow_pickle else _ArrayUnpickler
    return unpickler(file, encoding="latin1").load()


def _read_shards(index: Any, folder: str, allow_pickle: bool) -> dict[str, Any]:
    files = index.get("weight_map")
    if not isinstance(files, dict) or any(
        os.path.basename(name) != name for name in files.values()
    ):
        raise ValueError("a JSON file, but no index of weights")
    state: dict[str, Any] = {}
    for name in sorted(set(files.values())):
        shard = os.path.join(folder, name)
        if not os.path.isfile(shard):
            raise UserError(f"weights {shard} do not exist, but the index names them.")
        state |= read_file(shard, allow_pickle)
    return state


def _forbidden(path: str, name: str) -> UserError:
    return UserError(
        f"{path} holds other objects than weights and plain values ({name}); reading them could "
        "run any program. If you trust whoever made the file, rewrite it with: python "
        f"tools/convert_weights.py {path} NEW.pth --allow-pickle"
    )
