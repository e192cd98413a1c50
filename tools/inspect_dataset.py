#!/usr/bin/env python
"""Say what is in data sets: images, boxes, classes, sizes, duplicates, and what looks wrong.

::

    python tools/inspect_dataset.py cells/train.json --test cells/test.json
    python tools/inspect_dataset.py cells/train.json --images photos --output report
    python tools/inspect_dataset.py coco_2017_train --test coco_2017_val
    python tools/inspect_dataset.py --config-file configs/bccd.yaml --opts DATASETS.COCO_FORMAT ...

Data sets are annotation files in COCO format or registered names; without any, those of the
configuration's DATASETS. The configuration also gives the resize and the number of object queries.
With --output a folder gets report.json and, for each data set, pictures: distributions of sizes,
classes and positions, and a sheet of images with their boxes.
"""

import argparse
import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ddetr_d2.data.coco import CocoAnnotations, CocoSource, read_annotations
from ddetr_d2.data.coco.image_files import find_image_files
from ddetr_d2.data.coco.rows import read_rows
from ddetr_d2.data.datasets import coco_source, declare_data_sets
from ddetr_d2.data.report import DataReport, full_text, report_on
from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError, exit_on_user_error, nearest
from ddetr_d2.visualization.data_distributions import draw_distributions
from ddetr_d2.visualization.sample_sheet import draw_samples

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from matplotlib.figure import Figure

CONFIG_FILE = Path(__file__).parent.parent / "configs" / "deformable_detr_refine.yaml"


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "training",
        nargs="*",
        metavar="DATA",
        help="data sets that are trained on: annotation files or registered names",
    )
    parser.add_argument(
        "--test", nargs="+", default=[], metavar="DATA", help="data sets that are evaluated on"
    )
    parser.add_argument(
        "--images",
        action="append",
        default=[],
        metavar="FOLDER",
        help="image folder of the annotation files; once for all, or once for each of them in "
        "order, the training sets first (default: looked for beside each file)",
    )
    parser.add_argument("--output", metavar="FOLDER", help="for report.json and pictures")
    parser.add_argument(
        "--config-file", metavar="FILE", help="configuration (default: COCO's, with refined boxes)"
    )
    parser.add_argument(
        "--opts",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="KEY VALUE",
        help="change the configuration; comes last",
    )
    return parser


def find_sources(
    cfg: CfgNode, training: Sequence[str], test: Sequence[str], folders: Sequence[str]
) -> dict[str, CocoSource]:
    """The files of each data set, which is an annotation file or a registered name.

    Raises:
        UserError: there is no such set, or it is not clear where its images are.
    """
    everything = list(dict.fromkeys((*training, *test)))
    declare_data_sets(cfg)
    files = [name for name in everything if name not in DatasetCatalog]
    if folders and len(folders) not in (1, len(files)):
        raise UserError(
            f"--images is given {len(folders)} times for {len(files)} annotation files; give it "
            "once, or once for each"
        )
    if len(folders) < 2:
        folders = (*folders, None)[:1] * len(files)
    folder_of = dict(zip(files, folders, strict=True))
    names = short_names(files)
    return {
        name: _of_file(names[name], name, folder_of[name]) if name in files else coco_source(name)
        for name in everything
    }


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """For each path the shortest end of it that no other one has."""
    result = {}
    for path in paths:
        parts = Path(path).parts
        for length in range(1, len(parts) + 1):
            result[path] = "/".join(parts[-length:])
            if sum(Path(other).parts[-length:] == parts[-length:] for other in paths) == 1:
                break
    return result


def _of_file(name: str, path: str, folder: str | None) -> CocoSource:
    if not os.path.isfile(path):
        what = "does not exist" if os.path.splitext(path)[1] else "is no file or registered name"
        if os.path.isdir(path):
            what = "is a folder: name an annotation file in it"
        raise UserError(f"{path} {what}{nearest(path, DatasetCatalog)}")
    return CocoSource(name, path, folder or find_image_folder(path), "give --images FOLDER")


def find_image_folder(json_file: str) -> str:
    """The folder, beside an annotation file as people place it, in which its images are.

    Raises:
        UserError: none has any of the first images.
    """
    rows = read_rows(CocoSource(json_file, json_file, "")).images or []
    names = [row.file_name for row in rows[:20] if isinstance(row.file_name, str)]
    own = Path(json_file).parent
    # instances_train2017.json belongs to train2017/.
    stem = re.sub(r"^(instances|annotations?)[_.-]", "", Path(json_file).stem)
    candidates = [
        folder
        for parent in (own, own.parent)
        for folder in (parent / stem, parent / "images" / stem, parent / "images", parent)
        if folder.is_dir()
    ]
    # Looking for names that are written in another way goes through all files of a folder.
    for exact in (True, False):
        for folder in candidates:
            if exact:
                found = any((folder / name).is_file() for name in names)
            else:
                found = folder != own.parent and any(find_image_files(str(folder), names)[0])
            if found:
                return str(folder)
    raise UserError(
        f"{json_file}: its images are not beside it"
        + (f", {names[0]} is in none of {', '.join(map(str, candidates))}" if names else "")
        + "; give --images FOLDER"
    )


def write_report(
    output: str, report: DataReport, data_sets: Sequence[CocoAnnotations], cfg: CfgNode
) -> None:
    """Write report.json and the pictures of each data set into a folder.

    Raises:
        UserError: it cannot be written.
    """
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "report.json", "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(report), file, indent=1, ensure_ascii=False)
        written = ["report.json"]
        stems: set[str] = set()
        for annotations, part in zip(data_sets, report.data_sets, strict=True):
            stem = _file_stem(annotations.source.name, stems)
            written.append(f"{stem}_distributions.png")
            _save(draw_distributions(annotations, part, cfg), folder / written[-1])
            figure, failures = draw_samples(annotations)
            written.append(f"{stem}_samples.jpg")
            _save(figure, folder / written[-1])
            for failure in failures:
                print(f"left out of {written[-1]}: {failure}")
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error}") from error
    print(f"wrote {', '.join(written)} to {output}")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=100)


def _file_stem(name: str, taken: set[str]) -> str:
    stem = re.sub(r"[^\w.-]+", "_", name.removesuffix(".json"))
    number, free = 1, stem
    while free in taken:
        number += 1
        free = f"{stem}_{number}"
    taken.add(free)
    return free


def main(arguments: Sequence[str] | None = None) -> None:
    args = get_parser().parse_args(arguments)
    cfg = setup_cfg(args.config_file or str(CONFIG_FILE), args.opts)
    training, test = args.training, args.test
    if not training and not test:
        if not args.config_file:
            raise UserError("name annotation files or registered data sets, or give --config-file")
        training, test = list(cfg.DATASETS.TRAIN), list(cfg.DATASETS.TEST)
    sources = find_sources(cfg, training, test, args.images)
    read = {
        name: read_annotations(source, cfg.DATASETS.CROWDS_ARE_OBJECTS)
        for name, source in sources.items()
    }
    training, test = [read[name] for name in training], [read[name] for name in test]
    report = report_on(training, test, cfg)
    print(full_text(report))
    if args.output:
        write_report(args.output, report, [*training, *test], cfg)


if __name__ == "__main__":
    with exit_on_user_error():
        main()
