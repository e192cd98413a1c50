#!/usr/bin/env python
"""Annotation files in COCO format from a YOLO or a Pascal VOC folder.

::

    python tools/convert_dataset.py my_data --output my_data_coco

writes ``my_data_coco/train.json`` and, where the folder has them, ``val.json`` and ``test.json``,
and prints the command that trains on them. Images are neither copied nor changed.

YOLO: ``data.yaml`` of Ultralytics or Roboflow, or ``classes.txt`` or ``obj.names``; boxes,
polygons and oriented boxes (their enclosing boxes), pose labels (their boxes). VOC: XML files in
``Annotations`` or beside the images, and the sets of ``ImageSets/Main``. Without either,
folders called train, val, valid or test are the sets. Images without a label file, or with an
empty one, are images without objects.

Pixels of VOC files count from 1 and xmax and ymax are within the box, so that a whole image of
width W is xmin 1, xmax W: 1 is subtracted from xmin and ymin, as Detectron2 does. Some programs
write coordinates that count from 0 instead. A data set in which one is below 1 is read so; of
others it cannot be known, give ``--first-pixel 0`` (LabelImg writes them, with 1 for 0).
Objects marked difficult become ``iscrowd``: not trained on, and neither right nor wrong in the
evaluation, as in the VOC challenge.

Labels are read by ``supervision`` (https://supervision.roboflow.com).
"""

import argparse
import json
import os
import random
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ddetr_d2.checkpoint.writing import Output
from ddetr_d2.data.coco.image_files import read_headers
from ddetr_d2.data.wording import counted, plural
from ddetr_d2.errors import UserError, exit_on_user_error

from tqdm import tqdm

with exit_on_user_error():
    try:
        import dataset_voc
        import dataset_yolo
    except ImportError as error:
        raise UserError(f"{error}; this program needs it: pip install supervision") from error
from dataset_folders import Objects, ReadLabel, Split, find_labels, note

ROOT = Path(__file__).resolve().parent.parent


def to_coco(split: Split, objects: Sequence[Objects], classes: Sequence[str]) -> dict[str, Any]:
    """The content of a COCO file; images and categories are numbered from 1."""
    ids = {name: number for number, name in enumerate(classes, start=1)}
    images, annotations = [], []
    for image, found in zip(split.images, objects, strict=True):
        name = image.relative_to(split.folder).as_posix()
        size = {"width": found.width, "height": found.height}
        images.append({"id": len(images) + 1, "file_name": name, **size})
        for box, label, difficult in zip(*found[2:], strict=True):
            x1, y1, x2, y2 = map(float, box)
            # Coordinates are 32-bit numbers: further digits are rounding errors.
            bbox = [round(value, 4) for value in (x1, y1, x2 - x1, y2 - y1)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": len(images),
                    "category_id": ids[label],
                    "bbox": bbox,
                    "area": round(bbox[2] * bbox[3], 4),
                    "iscrowd": int(difficult),
                }
            )
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def hold_out(split: Split, fraction: float) -> list[Split]:
    """``split`` without a random part of its images, and that part as ``val``."""
    count = max(1, round(len(split.images) * fraction))
    if not (0 < fraction and count < len(split.images)):
        raise UserError(
            f"--hold-out {fraction} of {counted(len(split.images), 'image')} leaves a set empty"
        )
    chosen = set(random.Random(0).sample(range(len(split.images)), count))
    parts = [[i for i in range(len(split.images)) if (i in chosen) == c] for c in (False, True)]
    return [
        Split(name, split.folder, *([v[i] for i in part] for v in (split.images, split.labels)))
        for name, part in zip((split.name, "val"), parts, strict=True)
    ]


def training_command(output: Path, splits: Sequence[Split]) -> str:
    """The command that trains on the first split and evaluates on the first of the others."""
    prefix = re.sub(r"\W+", "_", output.resolve().name).strip("_") or "data"
    declared = [[f"{prefix}_{s.name}", f"{output / s.name}.json", str(s.folder)] for s in splits]
    names = [name for name, *_ in declared]
    test = next((n for n in names[1:] if not n.endswith("_trainval")), None)
    options = (
        ("DATASETS.COCO_FORMAT", json.dumps(declared, ensure_ascii=False)),
        ("DATASETS.TRAIN", f'("{names[0]}",)'),
        ("DATASETS.TEST", f'("{test}",)' if test else "()"),
        ("OUTPUT_DIR", f"output/{prefix}"),
    )
    program = os.path.relpath(ROOT / "train_net.py")
    config = os.path.relpath(ROOT / "configs" / "deformable_detr_refine.yaml")
    lines = [f"python {shlex.quote(program)} --config-file {shlex.quote(config)}"]
    return " \\\n    ".join(lines + [f"{key} {shlex.quote(value)}" for key, value in options])


def inspection_command(output: Path, splits: Sequence[Split]) -> str:
    """The command that reports on the converted data set."""
    program = os.path.relpath(ROOT / "tools" / "inspect_dataset.py")
    words = ["python", program, str(output / f"{splits[0].name}.json")]
    for split in splits[1:2]:
        words += ["--test", str(output / f"{split.name}.json")]
    for split in splits[:2]:
        words += ["--images", str(split.folder)]
    return shlex.join([*words, "--output", str(output / "report")])


def detect_format(source: Path) -> str:
    """``yolo`` or ``voc``, by the files that are there."""
    yolo, voc = dataset_yolo.is_yolo(source), dataset_voc.is_voc(source)
    if yolo and voc:
        raise UserError(
            f"{source} has class names of YOLO and XML files of Pascal VOC: give --from yolo or "
            "--from voc"
        )
    if not yolo and not voc:
        raise UserError(
            f"{source} is neither a YOLO folder (data.yaml with 'names', classes.txt or "
            "obj.names) nor a Pascal VOC folder (XML files with <annotation>); COCO files need no "
            "conversion"
        )
    return "yolo" if yolo else "voc"


def read_objects(splits: Sequence[Split], read_label: ReadLabel) -> dict[str, list[Objects]]:
    """The objects of every image of every split, by the name of the split."""
    images = [image for split in splits for image in split.images]
    headers = read_headers(images, "Reading image sizes")
    bad = [(path, h.error) for path, h in zip(images, headers, strict=True) if h.error]
    if bad:
        raise UserError(
            f"{counted(len(bad), 'image')} cannot be read: remove "
            f"{plural(len(bad), 'it', 'them')}; the first is {bad[0][0]}: {bad[0][1]}"
        )
    found = {}
    with tqdm(total=len(images), desc="Converting", unit="image") as bar:
        remaining = iter(headers)
        for split in splits:
            found[split.name] = []
            for label in split.labels:
                found[split.name].append(read_label(label, next(remaining)))
                bar.update()
    return found


def count_pixels_from(first: int | None, found: Iterable[Objects]) -> None:
    """Correct boxes of VOC, read as if the first pixel were 1, for a first pixel of 0.

    Args:
        first: 0 or 1; None: 0 if a coordinate is below 1.
        found: the objects; their boxes are changed in place.
    """
    boxes = [objects.boxes for objects in found if len(objects.boxes)]
    lowest = min((float(b[:, :2].min()) for b in boxes), default=0.0) + 1
    if first is None:
        first = int(lowest >= 1)
        why = f"the lowest is {lowest:g}; --first-pixel {1 - first} if that is wrong"
        note(f"coordinates are taken to count from {first} ({why})")
    if first == 0:
        for box in boxes:
            box[:, :2] += 1


def report(split: Split, found: Sequence[Objects]) -> None:
    """Print what is in a split, and what is odd about it."""
    boxes = sum(len(objects.boxes) for objects in found)
    empty = sum(not len(objects.boxes) for objects in found)
    print(
        f"{split.name}: {counted(len(found), 'image')} ({empty:,} without objects), "
        f"{counted(boxes, 'box', 'boxes')}"
    )
    difficult = sum(sum(objects.difficult) for objects in found)
    if difficult:
        note(f"{difficult} difficult objects of {split.name} become iscrowd: no training on them")
    outside = [
        (image, box)
        for image, objects in zip(split.images, found, strict=True)
        for box in objects.boxes
        if not (box[0] < objects.width and box[1] < objects.height and min(box[2:]) > 0)
    ]
    if outside:
        image, box = outside[0]
        note(
            f"{counted(len(outside), 'box', 'boxes')} of {split.name} "
            f"{plural(len(outside), 'lies', 'lie')} outside of the image, the first in {image}: "
            f"{', '.join(f'{value:g}' for value in box)} in pixels"
        )


def convert(args: argparse.Namespace) -> None:
    """Do what the arguments say."""
    source, output = Path(args.input), Path(args.output)
    if not source.exists():
        raise UserError(f"{source} does not exist: give the folder of a data set")
    if source.is_file() and (args.format == "voc" or source.suffix not in (".yaml", ".yml")):
        raise UserError(f"{source} is a file: give the folder of the data set (unpack archives)")
    target = Output(args.output, is_folder=True, overwrite=args.overwrite)
    kind = args.format or detect_format(source)
    if kind == "yolo":
        splits, classes, read_label = dataset_yolo.open_folder(source)
        splits = find_labels(splits, ".txt")
    else:
        classes, read_label = [], dataset_voc.read_label
        splits = find_labels(dataset_voc.find_splits(source), ".xml")
    if args.hold_out:
        splits = [*hold_out(splits[0], args.hold_out), *splits[1:]]
    found = read_objects(splits, read_label)
    everything = [objects for split in splits for objects in found[split.name]]
    if kind == "voc":
        count_pixels_from(args.first_pixel, everything)
        classes = sorted({name for objects in everything for name in objects.classes})
    if not any(objects.classes for objects in found[splits[0].name]):
        raise UserError(f"{splits[0].folder}: no label file has an object")

    try:
        with target as folder:
            for split in splits:
                content = to_coco(split, found[split.name], classes)
                with open(Path(folder, f"{split.name}.json"), "w", encoding="utf-8") as file:
                    json.dump(content, file, ensure_ascii=False)
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}") from error
    for split in splits:
        report(split, found[split.name])
    print(
        f"{counted(len(classes), 'class', 'classes')}: "
        f"{', '.join(classes[:10])}{', ...' * (len(classes) > 10)}"
    )
    if len(splits) == 1:
        note("there is no set to evaluate on; --hold-out 0.1 sets a tenth of the images aside")
    print(f"wrote {output}; look at it and train with\n")
    print(f"{inspection_command(output, splits)}\n\n{training_command(output, splits)}")


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", help="folder of the data set, or a YAML file of YOLO")
    parser.add_argument("--output", required=True, help="folder for the COCO files")
    parser.add_argument(
        "--from",
        dest="format",
        choices=("yolo", "voc"),
        help="format of the data set (default: the one that its files show)",
    )
    parser.add_argument(
        "--first-pixel",
        type=int,
        choices=(0, 1),
        help="number of an image's first pixel in VOC files (default: see above)",
    )
    parser.add_argument(
        "--hold-out",
        type=float,
        metavar="FRACTION",
        help="take this part of the training images, at random but always the same, as val",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files in the output")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    convert(get_parser().parse_args(arguments))


if __name__ == "__main__":
    with exit_on_user_error():
        main()
