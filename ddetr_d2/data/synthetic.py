"""A synthetic detection data set: shapes on textured backgrounds, written as COCO files.

::

    python -m ddetr_d2.data.synthetic --output DIR --train 2000 --val 200

writes ``DIR/train.json`` and ``DIR/val.json`` with their images in ``DIR/train/`` and ``DIR/val/``.
An image depends on (seed, split, index) and the size options alone: the same seed gives the same
files, and a larger number of images extends a smaller set.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import cv2
from tqdm import tqdm

from ..errors import UserError, exit_on_user_error
from .shapes import CLASSES, SPLITS, SyntheticOptions, draw_image

_DESCRIPTION = "ddetr_d2 synthetic shapes"
_VERSION = 2  # to be raised when the same options draw other images


def make_synthetic(
    output: str | Path,
    train: int = 2000,
    val: int = 200,
    *,
    seed: int = 0,
    min_size: int = 160,
    max_size: int = 224,
    max_objects: int = 6,
) -> None:
    """Write ``train`` and ``val`` images with their COCO annotation files under ``output``.

    A split that is there already, made with the same options, is left as it is. A number of 0
    leaves a split out.

    Raises:
        UserError: a number is out of its range, or ``output`` cannot be written or has
            annotation files that this program has not made.
    """
    options = SyntheticOptions(seed, min_size, max_size, max_objects)
    output = Path(output)
    counts = dict(zip(SPLITS, (train, val), strict=True))
    for split, count in counts.items():
        if count < 0:
            raise UserError(f"{count} {split} images: give 0 or more")
    # Everything that can stand in the way is found before the first image is drawn.
    todo = {s: n for s, n in counts.items() if n and not _is_complete(output, s, n, options)}
    try:
        for split in todo:
            (output / split).mkdir(parents=True, exist_ok=True)
        for split, count in todo.items():
            _write_split(output, split, count, options)
    except OSError as error:
        raise UserError(f"cannot write the synthetic data set to {output}: {error}") from error


def _info(split: str, count: int, options: SyntheticOptions) -> dict:
    return {
        "description": _DESCRIPTION,
        "version": _VERSION,
        "split": split,
        "images": count,
        **asdict(options),
    }


def _is_complete(output: Path, split: str, count: int, options: SyntheticOptions) -> bool:
    annotation_file = output / f"{split}.json"
    if not annotation_file.exists():
        return False
    try:
        content = json.loads(annotation_file.read_text())
        info = content["info"]
        names = {image["file_name"] for image in content["images"]}
    except (OSError, ValueError, LookupError, TypeError):
        info, names = None, set()
    if not isinstance(info, dict) or info.get("description") != _DESCRIPTION:
        raise UserError(
            f"{annotation_file} exists and is not a synthetic data set: "
            "it is left alone, give another output folder"
        )
    folder = output / split
    return (
        info == _info(split, count, options)
        and folder.is_dir()
        and names <= {p.name for p in folder.iterdir()}
    )


def _write_split(output: Path, split: str, count: int, options: SyntheticOptions) -> None:
    images: list[dict] = []
    annotations: list[dict] = []
    for index in tqdm(range(count), desc=f"synthetic {split}", unit="image"):
        image, objects = draw_image(options, split, index)
        name = f"{index:06d}.jpg"
        encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
        (output / split / name).write_bytes(encoded.tobytes())
        height, width = image.shape[:2]
        images.append({"id": index + 1, "file_name": name, "height": height, "width": width})
        for drawn in objects:
            x0, y0, x1, y1 = (round(value, 2) for value in drawn.box)
            box = [x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": drawn.class_index + 1,
                    "bbox": box,
                    "area": round(box[2] * box[3], 2),
                    "iscrowd": 0,
                }
            )
    content = {
        "info": _info(split, count, options),
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(CLASSES)],
        "images": images,
        "annotations": annotations,
    }
    # Written last and renamed into place, so that an interrupted run is never taken for complete.
    partial = output / f"{split}.json.partial"
    partial.write_text(json.dumps(content))
    partial.replace(output / f"{split}.json")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ddetr_d2.data.synthetic",
        description="Write a synthetic data set of shapes in COCO format: OUTPUT/train.json and "
        "OUTPUT/val.json, images in OUTPUT/train/ and OUTPUT/val/.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    defaults = SyntheticOptions()
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--train", type=int, default=2000, help="number of training images")
    parser.add_argument("--val", type=int, default=200, help="number of validation images")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="0 or more")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("MIN", "MAX"),
        default=(defaults.min_size, defaults.max_size),
        help="smallest and largest width and height of an image in pixels",
    )
    parser.add_argument(
        "--max-objects", type=int, default=defaults.max_objects, help="most objects in an image"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program on ``arguments`` (default: those of the command line)."""
    args = _parser().parse_args(arguments)
    with exit_on_user_error():
        make_synthetic(
            args.output,
            args.train,
            args.val,
            seed=args.seed,
            min_size=args.size[0],
            max_size=args.size[1],
            max_objects=args.max_objects,
        )
        print(f"synthetic data set: {Path(args.output).resolve()}")


if __name__ == "__main__":
    main()
