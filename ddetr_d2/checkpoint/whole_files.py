"""Files that appear under their name whole or not at all, and how to tell a damaged one."""

import contextlib
import errno
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

import torch

from ..errors import UserError

# End of the names of files that are not complete yet; they begin with a dot.
PARTIAL = ".being_written"
# First bytes of files without checksums: of torch.save before torch 1.6, and pickles.
_NO_CHECKSUM = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_REMEDIES = {
    errno.ENOSPC: "Free some space there, or write to another disk.",
    errno.EDQUOT: "Free some space within your quota, or write to another disk.",
    errno.EFBIG: "Raise the limit of the size of a file (ulimit -f).",
    errno.EROFS: "Make the disk writable, or write elsewhere.",
    errno.EACCES: "Make the folder writable, or write elsewhere.",
    errno.EPERM: "Make the folder writable, or write elsewhere.",
    errno.ENOENT: "The folder is gone: bring it back, or write elsewhere.",
}


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[BinaryIO]:
    """Write a file beside ``path``, which takes its name when all of it is on the disk.

    Where the writing fails or the process dies, what was at ``path`` stays as it was.

    Raises:
        UserError: if it cannot be written.
    """
    folder, name = os.path.split(os.path.abspath(path))
    partial = os.path.join(folder, f".{name}.{os.getpid()}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # some file systems report a full disk here, and not before
        os.replace(partial, path)
        _sync_folder(folder)
    except OSError as error:
        raise UserError(f"{path} {cannot_be_written(error, folder)}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(partial)


def cannot_be_written(error: OSError, folder: str) -> str:
    """The reason, the free space and a remedy, for a file or folder that ``error`` is about."""
    free = ""
    with contextlib.suppress(OSError):
        free = f" ({shutil.disk_usage(folder).free / 1e6:,.1f} MB free there)"
    reason = error.strerror or str(error)
    remedy = _REMEDIES.get(error.errno or 0, "Check the disk, or write elsewhere.")
    return f"cannot be written: {reason}{free}. {remedy}"


def _sync_folder(folder: str) -> None:
    """Bring a new name of a file to the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_partial_files(folder: str) -> None:
    """Remove what processes left in ``folder`` that died while they wrote a file.

    For a folder in which no other process is writing.
    """
    for name in os.listdir(folder):
        if name.startswith(".") and name.endswith(PARTIAL):
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(folder, name))


def save_whole(content: Any, path: str) -> None:
    """``torch.save(content, path)`` by way of :func:`whole_file`; nothing is copied in memory.

    Raises:
        UserError: if it cannot be written.
    """
    with whole_file(path) as file:
        writer = _Writer(file)
        torch.save(content, cast(BinaryIO, writer))
        if writer.error:
            raise writer.error


class _Writer:
    """What ``torch.save`` needs of a file. Keeps an error for later: PyTorch's writer does not
    survive one in the middle of a file."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.error: BaseException | None = None

    def write(self, data: memoryview) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except BaseException as error:  # KeyboardInterrupt too
                self.error = error
        return len(data)

    def flush(self) -> None:
        """The file is flushed at its end."""


def find_damage(path: str) -> str:
    """What is wrong with a file of ``torch.save``, to follow its name; empty if it is whole.

    The whole file is read: torch writes a CRC-32 for each part of it, but does not check it when
    it loads. Files of torch before 1.6 and pickles have no checksum and pass.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(2)
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not start:
        return "is empty"
    if start in _NO_CHECKSUM:
        return ""
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
        if record:
            return f"is damaged (the checksum of {os.path.basename(record)} is wrong)"
        read_lazily(path)
    except pickle.UnpicklingError:  # whole, but of forbidden objects
        return ""
    except Exception as error:  # there are as many as there are fields in a damaged directory
        if isinstance(error, zipfile.BadZipFile):
            return "is cut short or damaged"
        return f"is damaged ({str(error).splitlines()[0][:100] if str(error) else type(error)})"
    return ""


def read_lazily(path: str) -> Any:
    """The content of a file of ``torch.save``; tensors are read from the disk when they are used.

    Raises:
        Exception: of many kinds, if it is damaged or no such file.
    """
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
