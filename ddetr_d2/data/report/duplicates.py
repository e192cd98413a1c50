"""Image files that are byte by byte the same, within data sets and between them."""

import hashlib
import os
import stat
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from tqdm import tqdm

# Threads wait for the disk or the network most of the time.
_THREADS = min(32, 4 * (os.cpu_count() or 1))
_CHUNK = 64
_PROGRESS_FROM = 10_000  # files; fewer take less than a second
# Bytes that tell most files of the same size apart.
_BEGINNING = 16 * 1024


@dataclass
class DuplicateImages:
    """Image files of the same content.

    Attributes:
        groups: of each content that occurs more than once the files, by data set.
        unchecked: files that could not be looked at: they lie elsewhere, or cannot be read.
    """

    groups: list[dict[str, list[str]]]
    unchecked: int

    def repeated_in(self, name: str) -> int:
        """How many files of a data set repeat another one of it."""
        return sum(len(group.get(name, [None])) - 1 for group in self.groups)

    def shared(self, name: str, other: str) -> list[tuple[str, str]]:
        """The files of ``other`` that ``name`` has as well, each with the first such one there:
        pairs of (file of ``name``, file of ``other``)."""
        return [
            (group[name][0], path)
            for group in self.groups
            if name in group
            for path in group.get(other, [])
        ]


def find_duplicates(
    sets: Mapping[str, Sequence[str]],
    between: tuple[Collection[str], Collection[str]] | None = None,
) -> DuplicateImages:
    """Find files of the same content without decoding any.

    Only files of the same size are opened, and read beyond their beginning only where that is the
    same as well. A hard link or a file of several data sets is known to be the same unopened.

    Args:
        sets: the paths of each data set; a path counts once in each.
        between: names of sets; if given, only files that are in one of the first and in one of the
            second are looked for, for which fewer have to be opened.
    """
    paths = sorted({path for files in sets.values() for path in files})
    keys: dict[str, Hashable] = {}
    identities: dict[str, Hashable] = {}
    for path, status in zip(paths, _in_parallel(_status, paths, "image files"), strict=True):
        if status is not None:
            keys[path] = status.st_size
            # Some file systems number nothing.
            identities[path] = (status.st_dev, status.st_ino) if status.st_ino else path
    unchecked = len(paths) - len(keys)
    if between:
        ours, theirs = (
            {keys.get(path) for name in names for path in sets[name]} for names in between
        )
        common = ours & theirs
        keys = {path: size for path, size in keys.items() if size in common}
    for hash, description in (
        (_hash_beginning, "files of the same size"),
        (_hash_whole, "files that begin the same way"),
    ):
        candidates = _representatives(keys, identities)
        hashes = _in_parallel(hash, candidates, description)
        by_identity = dict(zip((identities[path] for path in candidates), hashes, strict=True))
        failed = {identity for identity, value in by_identity.items() if value is None}
        for path in [path for path in keys if identities[path] in failed]:
            del keys[path]
            unchecked += 1
        for path, key in keys.items():
            keys[path] = (key, by_identity.get(identities[path]))
    return DuplicateImages(_groups(sets, keys), unchecked)


def _representatives(keys: dict[str, Hashable], identities: dict[str, Hashable]) -> list[str]:
    """One path of each file that has its key in common with another file."""
    files: dict[Hashable, dict[Hashable, str]] = {}
    for path, key in keys.items():
        files.setdefault(key, {}).setdefault(identities[path], path)
    return [path for same in files.values() if len(same) > 1 for path in same.values()]


def _groups(
    sets: Mapping[str, Sequence[str]], keys: dict[str, Hashable]
) -> list[dict[str, list[str]]]:
    groups: dict[Hashable, dict[str, list[str]]] = {}
    for name, files in sets.items():
        for path in dict.fromkeys(files):
            if path in keys:
                groups.setdefault(keys[path], {}).setdefault(name, []).append(path)
    return [group for group in groups.values() if sum(map(len, group.values())) > 1]


def _in_parallel(function: Callable, paths: Sequence[str], description: str) -> Iterable:
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    bar = tqdm(
        total=len(paths),
        desc=description,
        unit="file",
        leave=False,
        disable=len(paths) < _PROGRESS_FROM,
    )
    with bar, ThreadPoolExecutor(_THREADS) as pool:
        for results in pool.map(lambda chunk: [function(path) for path in chunk], chunks):
            yield from results
            bar.update(len(results))


def _status(path: str) -> os.stat_result | None:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def _hash_beginning(path: str) -> bytes | None:
    try:
        with open(path, "rb", buffering=0) as file:
            return hashlib.blake2b(file.read(_BEGINNING), digest_size=16).digest()
    except OSError:
        return None


def _hash_whole(path: str) -> bytes | None:
    try:
        with open(path, "rb", buffering=0) as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError:
        return None
