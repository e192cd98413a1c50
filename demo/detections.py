"""Detections in a file: COCO results or CSV, with parts that a run that was ended goes on from.

While a run lasts, each of its processes appends what it found on an image to a file of its own in
the folder ``FILE.parts``, one line for an image. At the end the lines become ``FILE``, and the
folder is removed.
"""

import array
import csv
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from ddetr_d2 import Detector
from ddetr_d2.checkpoint.whole_files import cannot_be_written
from ddetr_d2.errors import UserError
from ddetr_d2.main_process import on_main_process

from detectron2.structures import Instances
from detectron2.utils import comm

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

SUFFIXES = (".json", ".csv")
CSV_COLUMNS = ("file", "class", "score", "x1", "y1", "x2", "y2")
# File in the folder of the parts: what the detections depend on.
_SETTINGS = "settings.json"


def check_detections_file(path: str) -> None:
    """Check the name of a file for detections.

    Raises:
        UserError: if it has another suffix than ``.json`` or ``.csv``, or is a folder.
    """
    if not path.lower().endswith(SUFFIXES):
        raise UserError(f"--save-detections {path}; give a name that ends in .json or .csv.")
    if os.path.isdir(path):
        raise UserError(f"--save-detections {path} is a folder; give the name of a file.")


def settings_of(detector: Detector, threshold: float, drawings: str | None) -> dict[str, Any]:
    """What the lines of detections depend on, by the names that a user knows it by.

    Args:
        detector: makes the detections.
        threshold: lowest score that is saved.
        drawings: where the images are drawn as well. Those with a line are not drawn again.
    """
    # Batch normalisation is folded into the backbone's weights, rounded otherwise by other
    # machines. Detectors with the same backbone differ in their other weights.
    weights = hashlib.sha256()
    for name, tensor in detector.model.state_dict().items():
        if not name.startswith("backbone."):
            weights.update(name.encode())
            weights.update(tensor.cpu().contiguous().numpy().tobytes())
    cfg = detector.cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = cfg.MODEL.DEVICE = ""
    return {
        "--confidence-threshold": threshold,
        "--output": drawings,
        "weights": weights.hexdigest(),
        "class names": detector.class_names,
        "configuration": "\n".join(cfg[node].dump() for node in ("MODEL", "INPUT", "TEST")),
    }


class DetectionParts:
    """The detections of a run that is under way.

    Every process of the run makes one, and leaves it as a context.
    """

    def __init__(self, path: str, settings: Mapping[str, Any]):
        """
        Args:
            path: the file that the detections are for.
            settings: what they depend on, of :func:`settings_of`.

        Raises:
            UserError: if there are parts of a run with other settings, another process writes
                them, or the folder cannot be written.
        """
        self._path = path
        self._folder = f"{path}.parts"
        on_main_process(lambda: self._start(settings))
        try:
            self._file = open(self._part(comm.get_rank()), "a+b", buffering=0)
        except OSError as error:
            raise UserError(f"{path} {cannot_be_written(error, self._folder)}") from error
        self._lock()
        # A process that was killed may have left half a line. It is ended, and belongs to no image.
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._write(b"\n")

    def __enter__(self) -> "DetectionParts":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def done(self, images: Sequence[str]) -> bytearray:
        """For each of the images 1 if its detections are there, else 0."""
        numbers = {image: number for number, image in enumerate(images)}
        done = bytearray(len(images))
        for _, _, record in self._records():
            number = numbers.get(record["file"])
            if number is not None:
                done[number] = 1
        return done

    def append(self, image: str, instances: Instances) -> None:
        """Write what was detected on an image.

        Raises:
            UserError: if that is not possible.
        """
        record = {
            "file": image,
            "size": instances.image_size,  # height, width
            "classes": instances.pred_classes.tolist(),
            "scores": [round(score, 5) for score in instances.scores.tolist()],
            "boxes": [
                [round(number, 2) for number in box] for box in instances.pred_boxes.tensor.tolist()
            ],
        }
        self._write(json.dumps(record).encode() + b"\n")

    def finish(self, images: Sequence[str], class_names: Sequence[str]) -> int:
        """Make the file of the parts, and remove them. For one process, after all are through.

        Args:
            images: in the order that they are to have in the file. Those without a line are left
                out, and lines of other images.
            class_names: names of the classes.

        Returns:
            the number of detections.

        Raises:
            UserError: if the file cannot be written.
        """
        write = _write_csv if self._path.lower().endswith(".csv") else _write_coco
        try:
            # Written in the folder of the parts, so that a process that is killed leaves nothing
            # beside it.
            whole = os.path.join(self._folder, "whole")
            count, files = write(whole, self._path, self._in_order(images), class_names)
            for partial, path in files:
                os.replace(partial, path)
            self._file.close()
            shutil.rmtree(self._folder)
        except OSError as error:
            folder = os.path.dirname(self._path) or "."
            raise UserError(f"{self._path} {cannot_be_written(error, folder)}") from error
        return count

    def _start(self, settings: Mapping[str, Any]) -> None:
        path = os.path.join(self._folder, _SETTINGS)
        if os.path.exists(path):
            with open(path) as file:
                before = json.load(file)
            if before != settings:
                raise UserError(self._other_settings(before, settings))
            return
        try:
            os.makedirs(self._folder, exist_ok=True)
            with open(f"{path}.partial", "w") as file:
                json.dump(settings, file)
            os.replace(f"{path}.partial", path)
        except OSError as error:
            folder = os.path.dirname(self._path) or "."
            raise UserError(f"{self._path} {cannot_be_written(error, folder)}") from error

    def _other_settings(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
        differences = []
        for name in now:
            value = before.get(name)
            if value == now[name]:
                continue
            if name.startswith("--"):
                differences.append(f"without {name}" if value is None else f"with {name} {value}")
            else:
                differences.append(f"with other {name}")
        return (
            f"{self._folder} has the detections of a run that was ended, "
            f"{' and '.join(differences)}: give the same to go on with it, or remove that folder "
            "to start anew."
        )

    def _part(self, rank: int) -> str:
        return os.path.join(self._folder, f"{rank:05}.jsonl")

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(
                    f"another run writes {self._path}; wait for its end, or give another file."
                ) from error
            # A file system without locks.

    def _write(self, line: bytes) -> None:
        try:
            while line:  # a disk that is full takes some of it before it says so
                line = line[self._file.write(line) :]
        except OSError as error:
            raise UserError(f"{self._path} {cannot_be_written(error, self._folder)}") from error

    def _records(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Of each whole line the file, the offset and the content."""
        for name in sorted(os.listdir(self._folder)):
            if not name.endswith(".jsonl"):
                continue
            path, offset = os.path.join(self._folder, name), 0
            with open(path, "rb") as file:
                for line in file:
                    try:
                        yield path, offset, json.loads(line)
                    except ValueError:  # cut short
                        pass
                    offset += len(line)

    def _in_order(self, images: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The content of the lines in the order of the images; one line at a time in memory."""
        numbers = {image: number for number, image in enumerate(images)}
        offsets = array.array("q", [-1]) * len(images)
        files = array.array("i", [0]) * len(images)
        opened: dict[str, int] = {}
        for path, offset, record in self._records():
            number = numbers.get(record["file"])
            if number is not None:
                offsets[number], files[number] = offset, opened.setdefault(path, len(opened))
        parts = [open(path, "rb") for path in opened]
        try:
            for offset, part in zip(offsets, files, strict=True):
                if offset >= 0:
                    parts[part].seek(offset)
                    yield json.loads(parts[part].readline())
        finally:
            for file in parts:
                file.close()


Written = tuple[int, list[tuple[str, str]]]


def _write_csv(
    whole: str, path: str, records: Iterator[dict[str, Any]], class_names: Sequence[str]
) -> Written:
    count = 0
    # Names of files need not be text.
    with open(whole, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for record in records:
            for number, score, box in _detections(record):
                writer.writerow([record["file"], class_names[number], score, *box])
                count += 1
        _to_disk(file)
    return count, [(whole, path)]


def _write_coco(
    whole: str, path: str, records: Iterator[dict[str, Any]], class_names: Sequence[str]
) -> Written:
    """COCO results, and a COCO file of the images and categories that their ids stand for."""
    count = 0
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(class_names)]
    with open(whole, "w") as file, open(f"{whole}.images", "w") as images:
        file.write("[")
        images.write(f'{{"categories": {json.dumps(categories)}, "annotations": [], "images": [')
        for image_id, record in enumerate(records, start=1):
            height, width = record["size"]
            image = {"id": image_id, "file_name": record["file"], "width": width, "height": height}
            images.write(",\n" if image_id > 1 else "\n")
            images.write(json.dumps(image))
            for number, score, (x1, y1, x2, y2) in _detections(record):
                detection = {
                    "image_id": image_id,
                    "category_id": number + 1,
                    "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
                    "score": score,
                }
                file.write(",\n" if count else "\n")
                file.write(json.dumps(detection))
                count += 1
        file.write("\n]\n")
        images.write("\n]}\n")
        _to_disk(file)
        _to_disk(images)
    # The results come last: where they are, the other file is.
    return count, [(f"{whole}.images", images_file(path)), (whole, path)]


def images_file(path: str) -> str:
    """Name of the file of the images and categories that belongs to a file of COCO results."""
    return f"{path[: -len('.json')]}.images.json"


def _detections(record: Mapping[str, Any]) -> Iterator[tuple[int, float, list[float]]]:
    return zip(record["classes"], record["scores"], record["boxes"], strict=True)


def _to_disk(file: TextIO) -> None:
    file.flush()
    os.fsync(file.fileno())  # some file systems report a full disk here, and not before
