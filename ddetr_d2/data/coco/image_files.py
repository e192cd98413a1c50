"""The image files of a data set: finding them, and reading their headers."""

import os
import re
import sqlite3
import struct
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, NamedTuple
from urllib.parse import unquote

from detectron2.utils.file_io import PathManager
from iopath.common.file_io import get_cache_dir
from PIL import Image, ImageFile, UnidentifiedImageError
from tqdm import tqdm

from ..images import readable_formats

_ORIENTATION = 0x0112
# Threads wait for the disk or the network most of the time.
_THREADS = min(32, 4 * (os.cpu_count() or 1))
# Headers of fewer images are read faster than it is worth remembering them.
REMEMBERED_FROM = 1000
_CHUNK = 256
_PNG_TEXTS = {b"eXIf", b"iTXt", b"tEXt", b"zTXt"}


class ImageHeader(NamedTuple):
    """Width and height of an image as it is stored, in pixels, and its EXIF orientation, 1 to 8.

    Of a file that cannot be read ``error`` says why, and the numbers are 0.
    """

    width: int
    height: int
    orientation: int
    error: str = ""

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the image when it is turned as the orientation says."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def find_image_files(root: str, names: Sequence[str]) -> tuple[list[str | None], int]:
    """Find image files by the names that annotation files give them.

    Where there is no file of that very name under ``root``, the name is also tried with slashes
    for backslashes, with percent escapes resolved, in another Unicode form or case, and without
    folders in front, as long as no two names come to stand for one file.

    Returns:
        the path of each name, None where there is no such file; how many names had to be changed.
    """
    # One listing of each folder: asking for 100,000 files one by one takes minutes on a network
    # file system.
    literal = [os.path.join(root, name) for name in names]
    folders: dict[str, set[str]] = {}
    for path in literal:
        folder = os.path.dirname(path)
        if folder not in folders:
            folders[folder] = set(PathManager.ls(folder)) if PathManager.isdir(folder) else set()
    missing = [
        index
        for index, path in enumerate(literal)
        if os.path.basename(path) not in folders[os.path.dirname(path)]
    ]
    paths: list[str | None] = [*literal]
    if not missing:
        return paths, 0
    for index in missing:
        paths[index] = None
    known, taken = _files_under(root), {os.path.normpath(path) for path in paths if path}
    found = {name: _look_up(name, known) for name in {names[index] for index in missing}}
    times = Counter(found.values())
    for index in missing:
        elsewhere = found[names[index]]
        if elsewhere is not None and times[elsewhere] == 1 and elsewhere not in taken:
            paths[index] = elsewhere
    return paths, sum(paths[index] is not None for index in missing)


def similar_files(root: str, names: Sequence[str]) -> dict[str, str]:
    """What could be meant by names that no file has, in words: " (there are A.jpg and a.JPG)"."""
    by_stem: dict[str, list[str]] = {}
    for paths in _files_under(root).values():
        for path in paths:
            by_stem.setdefault(_stem(path), []).append(os.path.relpath(path, root))
    hints = {}
    for name in names:
        found = sorted(by_stem.get(_stem(name), []))
        if found:
            verb = "is" if len(found) == 1 else "are"
            hints[name] = f" (there {verb} {' and '.join(found[:2])})"
    return hints


def _stem(path: str) -> str:
    """The folded name of a file without folders and ending."""
    return os.path.splitext(_folded(re.split(r"[/\\]", unquote(path))[-1]))[0]


def _files_under(root: str) -> dict[str, list[str]]:
    """All files under a local folder by their folded path relative to it."""
    known: dict[str, list[str]] = {}
    pending, seen = [root], set()  # links may lead round in a circle
    for start in pending:
        for folder, folders, files in os.walk(start):
            if os.path.realpath(folder) in seen:
                folders.clear()
                continue
            seen.add(os.path.realpath(folder))
            pending += filter(os.path.islink, (os.path.join(folder, name) for name in folders))
            for file in files:
                path = os.path.join(folder, file)
                known.setdefault(_folded(os.path.relpath(path, root)), []).append(path)
    return known


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _look_up(name: str, known: dict[str, list[str]]) -> str | None:
    for text in dict.fromkeys((name, unquote(name))):
        # ?d= is where Label Studio's addresses of local files hold the path.
        words = re.split(r"[/\\]|\?d=", _folded(text).strip())
        parts = [part for part in words if part not in ("", ".")]
        for first in range(len(parts)):
            paths = known.get(os.sep.join(parts[first:]), [])
            if len(paths) == 1:
                return paths[0]
            if paths:
                return None
    return None


def read_headers(paths: Sequence[str], description: str) -> list[ImageHeader]:
    """Read the headers of image files, many at a time, without decoding any image.

    Those of large data sets are remembered in a file of Detectron2's cache folder (environment
    variable ``FVCORE_CACHE``) until the image file changes.

    Args:
        paths: local files.
        description: what the progress bar, which appears for large data sets, says.
    """
    many = len(paths) >= REMEMBERED_FROM
    remembered = _Remembered() if many else None
    headers: list[ImageHeader] = []
    chunks = [paths[start : start + _CHUNK] for start in range(0, len(paths), _CHUNK)]
    bar = tqdm(total=len(paths), desc=description, unit="image", disable=not many)
    with bar, warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        # Said when the image itself is read.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for chunk in chunks:
            stamps = list(pool.map(_stamp, chunk))
            known = remembered.look_up(chunk, stamps) if remembered else {}
            unknown = [path for path in chunk if path not in known]
            new = dict(zip(unknown, pool.map(read_header, unknown), strict=True))
            if remembered and new:
                remembered.add(new, dict(zip(chunk, stamps, strict=True)))
            headers += [known.get(path) or new[path] for path in chunk]
            bar.update(len(chunk))
    if remembered:
        remembered.close()
    return headers


def read_header(path: str) -> ImageHeader:
    """Read the header of one image file."""
    try:
        with Image.open(path, formats=readable_formats()) as image:
            width, height = image.size
            orientation = _exif(image).get(_ORIENTATION, 1)
            swapped = image.format == "TIFF"  # Pillow gives the size of the upright image
    except Image.DecompressionBombError as error:
        return ImageHeader(0, 0, 1, f"too large: {error}")
    except UnidentifiedImageError:
        return ImageHeader(0, 0, 1, "no image, or of an unknown kind")
    except OSError as error:
        return ImageHeader(0, 0, 1, error.strerror or str(error) or type(error).__name__)
    except Exception as error:  # Pillow's readers raise errors of any type on damaged headers
        return ImageHeader(0, 0, 1, f"damaged: {str(error) or type(error).__name__}")
    if not (isinstance(orientation, int) and 1 <= orientation <= 8):
        orientation = 1
    if swapped and orientation >= 5:
        width, height = height, width
    return ImageHeader(width, height, orientation)


def _exif(image: ImageFile.ImageFile) -> Image.Exif:
    # To look for EXIF data behind the pixels of a PNG file, Pillow decodes it. Few have it there.
    if image.format == "PNG" and image.fp and not _has_text_behind_pixels(image.fp):
        return Image.Image.getexif(image)
    return image.getexif()


def _has_text_behind_pixels(file: IO[bytes]) -> bool:
    """Whether a PNG file has texts or EXIF data behind its pixels; leaves it where it was."""
    position, kinds = file.tell(), [b""]
    file.seek(8)
    while kinds[-1] != b"IEND" and len(start := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", start)
        kinds.append(kind)
        file.seek(length + 4, os.SEEK_CUR)
    file.seek(position)
    return b"IDAT" in kinds and not _PNG_TEXTS.isdisjoint(kinds[kinds.index(b"IDAT") :])


def _stamp(path: str) -> tuple[int, int]:
    """What changes when a file does: the time of its last change in ns, and its size in bytes."""
    try:
        status = os.stat(path)
    except OSError:
        return (0, 0)
    return (status.st_mtime_ns, status.st_size)


class _Remembered:
    """Headers read before. Whatever goes wrong with their file only costs time."""

    def __init__(self) -> None:
        self._database: sqlite3.Connection | None = None
        try:
            folder = os.path.join(get_cache_dir(), "ddetr_d2")
            os.makedirs(folder, exist_ok=True)
            self._database = sqlite3.connect(os.path.join(folder, "image_headers.sqlite"))
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS headers (path TEXT PRIMARY KEY, changed INTEGER, "
                "bytes INTEGER, width INTEGER, height INTEGER, orientation INTEGER)"
            )
        except (OSError, sqlite3.Error):
            self._give_up()

    def look_up(
        self, paths: Sequence[str], stamps: Sequence[tuple[int, int]]
    ) -> dict[str, ImageHeader]:
        """The headers of those of ``paths`` that have not changed since they were read."""
        if self._database is None:
            return {}
        absolute = {os.path.abspath(path): path for path in paths}
        current = dict(zip(paths, stamps, strict=True))
        query = f"SELECT * FROM headers WHERE path IN ({','.join('?' * len(absolute))})"
        found = {}
        try:
            for path, changed, size, *numbers in self._database.execute(query, list(absolute)):
                if current[absolute[path]] == (changed, size):
                    found[absolute[path]] = ImageHeader(*numbers)
        except (sqlite3.Error, UnicodeError):
            self._give_up()
        return found

    def add(self, headers: dict[str, ImageHeader], stamps: dict[str, tuple[int, int]]) -> None:
        if self._database is None:
            return
        rows = [
            (os.path.abspath(path), *stamps[path], *header[:3])
            for path, header in headers.items()
            if not header.error
        ]
        try:
            with self._database:
                self._database.executemany(
                    "INSERT OR REPLACE INTO headers VALUES (?, ?, ?, ?, ?, ?)", rows
                )
        except (sqlite3.Error, UnicodeError):
            self._give_up()

    def close(self) -> None:
        if self._database is not None:
            self._database.close()

    def _give_up(self) -> None:
        self.close()
        self._database = None
