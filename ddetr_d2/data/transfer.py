"""Batches on their way from the processes that load them to the one that trains.

Between processes PyTorch hands over tensors one by one, each with a connection and a file of its
own, which takes both sides half a millisecond. Here all the tensors of a batch go as one.
"""

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Of each tensor's beginning, in bytes: as for memory that PyTorch allocates.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Packed:
    """An object, pickled but for its tensors, and their bytes one after the other: (B,) uint8."""

    pickled: bytes
    tensors: Tensor


def pack(batch: Any) -> Packed:
    """Pack what can be pickled. Its tensors have to be on the CPU to go the fast way."""
    file = io.BytesIO()
    packer = _Packer(file)
    packer.dump(batch)
    return Packed(file.getvalue(), torch.cat(packer.pieces))


def unpack(packed: Packed) -> Any:
    """The object. Its tensors share their memory, and none of their elements."""
    return _Unpacker(io.BytesIO(packed.pickled), packed.tensors).load()


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.pieces = [torch.empty(0, dtype=torch.uint8)]
        self._size = 0
        self._packed: dict[int, tuple[Tensor, tuple]] = {}  # keeps the tensors, and so their ids

    def persistent_id(self, obj: Any) -> tuple | None:
        if type(obj) is not Tensor or obj.layout != torch.strided or obj.device.type != "cpu":
            return None
        if id(obj) not in self._packed:
            piece = obj.detach().contiguous().view(-1).view(torch.uint8)
            self._packed[id(obj)] = obj, (self._size, len(piece), obj.dtype, obj.shape)
            padding = piece.new_empty(-len(piece) % _ALIGNMENT)
            self.pieces += [piece, padding]
            self._size += len(piece) + len(padding)
        return self._packed[id(obj)][1]


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Tensor) -> None:
        super().__init__(file)
        self._tensors = tensors
        self._unpacked: dict[tuple, Tensor] = {}

    def persistent_load(self, pid: tuple) -> Tensor:
        start, length, dtype, shape = pid
        if pid not in self._unpacked:
            self._unpacked[pid] = self._tensors[start : start + length].view(dtype).view(shape)
        return self._unpacked[pid]
