"""A small data set in COCO format to break in every way."""

import copy
import json
from pathlib import Path

from ddetr_d2 import add_deformable_detr_config

import numpy as np
import pytest
from detectron2.config import CfgNode, get_cfg
from PIL import Image

CONTENT = {
    "images": [
        {"id": 1, "file_name": "a.png", "width": 60, "height": 40},
        {"id": 2, "file_name": "b.png", "width": 30, "height": 50},
        {"id": 3, "file_name": "empty.png", "width": 20, "height": 20},
    ],
    "annotations": [
        {
            "id": i,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
        }
        for i, (image_id, category_id, box) in enumerate(
            [(1, 1, [5, 5, 20, 10]), (1, 2, [30, 10, 25, 25]), (2, 2, [0, 0, 30, 50])], start=1
        )
    ],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
}


class CocoFolder:
    """Writes a data set: ``content`` to an annotation file, its images to a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.content = copy.deepcopy(CONTENT)
        self.json_file = root / "annotations.json"
        self.images = root / "images"
        self.images.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for image in self.content["images"]:
            pixels = rng.integers(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.images / image["file_name"])

    def write(self) -> None:
        self.json_file.write_text(json.dumps(self.content))

    def entry(self, name: str) -> list[str]:
        return [name, str(self.json_file), str(self.images)]


@pytest.fixture
def coco(tmp_path: Path) -> CocoFolder:
    folder = CocoFolder(tmp_path / "coco")
    folder.write()
    return folder


@pytest.fixture
def other_coco(tmp_path: Path) -> CocoFolder:
    return CocoFolder(tmp_path / "other")


@pytest.fixture
def cfg() -> CfgNode:
    cfg = get_cfg()
    add_deformable_detr_config(cfg)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ()
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


@pytest.fixture(autouse=True)
def own_catalogs(clean_catalogs):
    """Every test here may register data sets."""
