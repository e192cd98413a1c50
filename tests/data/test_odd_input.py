"""Odd and broken data sets end in the right boxes and figures, or in one line that says why."""

import json
import logging
import math
import re
from pathlib import Path

from ddetr_d2.data import (
    DetrDatasetMapper,
    coco_set,
    infer_num_classes,
    load_records,
    register_datasets,
)
from ddetr_d2.errors import UserError
from ddetr_d2.evaluation import CocoBoxEvaluator

import odd_boxes  # noqa: F401, registers its kinds
import odd_files  # noqa: F401
import odd_ids  # noqa: F401
import odd_images  # noqa: F401
import odd_input
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances

from tests.conftest import TINY

KINDS = odd_input.KINDS


def test_there_are_enough_kinds():
    assert len({kind.name for kind in KINDS}) == len(KINDS) >= 90
    assert sum(not kind.refused for kind in KINDS) >= 45


def declare(kind: odd_input.Kind, root: Path) -> list[str]:
    """Make a data set of a kind; returns the options that train and test on it."""
    data = odd_input.Data(root)
    kind.make(data)
    data.write()
    declared = [["odd", str(data.json_file), str(data.image_root)]]
    if data.test:
        declared.append(["odd_test", str(data.test.json_file), str(data.test.image_root)])
    return [
        *("DATASETS.COCO_FORMAT", repr(declared)),
        *("DATASETS.TRAIN", "('odd',)"),
        *("DATASETS.TEST", f"('{declared[-1][0]}',)"),
        *data.options,
    ]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_kind(kind, cfg, tmp_path, caplog):
    cfg.merge_from_list([*declare(kind, tmp_path / "odd"), "TEST.DETECTIONS_PER_IMAGE", "300"])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TRAIN", "(48,)", "INPUT.MIN_SIZE_TEST", "48"])
    cfg.INPUT.CROP.ENABLED = False
    with caplog.at_level(logging.INFO, logger="ddetr_d2"):
        if kind.refused:
            with pytest.raises(UserError) as caught:
                use(kind, cfg)
            message = str(caught.value)
            assert re.search(kind.refused, message), message
            assert len(message.splitlines()) == 1 and len(message) < 1000
            return
        use(kind, cfg)
    assert re.search(kind.said, caplog.text), caplog.text
    found = coco_set("odd").annotations
    assert sum(left.count for left in found.left_out.values()) == kind.left_out
    if not kind.said:
        assert found.summary() == ""


def use(kind: odd_input.Kind, cfg) -> None:
    """Read, map and evaluate a data set, and compare with what is expected."""
    classes = register_datasets(cfg)
    infer_num_classes(cfg, classes)
    for names, expected, training in (
        (cfg.DATASETS.TRAIN, kind.boxes, True),
        (cfg.DATASETS.TEST, kind.test_boxes, False),
    ):
        records = load_records(names[0])
        mapper = DetrDatasetMapper(cfg, is_train=training)
        for record in records:
            image = mapper(record)
            assert image["image"].dtype == torch.uint8 and min(image["image"].shape) > 0
            if training:
                boxes = image["instances"].gt_boxes
                assert boxes.nonempty().all() and torch.isfinite(boxes.tensor).all()
                assert len(boxes) == sum(not a["iscrowd"] for a in record["annotations"])
        if training:
            assert_boxes(records, classes, expected)
        else:
            assert_perfect(cfg, names[0], classes, expected)


def key(file_name: str, expected: odd_input.Boxes) -> str:
    """The file in ``expected`` that a record is of; kinds may have renamed the first."""
    name = Path(file_name).name
    return name if name in expected else "a.jpg"


def assert_boxes(records: list[dict], classes: list[str], expected: odd_input.Boxes) -> None:
    found: dict[str, list] = {key(record["file_name"], expected): [] for record in records}
    for record in records:
        found[key(record["file_name"], expected)] += [
            (classes[a["category_id"]], a["bbox"])
            for a in record["annotations"]
            if not a["iscrowd"]
        ]
        assert all(a["bbox_mode"] == BoxMode.XYWH_ABS for a in record["annotations"])
    assert found == {file: [(n, list(b)) for n, b in objects] for file, objects in expected.items()}


def assert_perfect(cfg, name: str, classes: list[str], expected: odd_input.Boxes) -> None:
    """A model that finds what is expected, and nothing else, has an AP of 100."""
    data = coco_set(name)
    evaluator = CocoBoxEvaluator(
        name,
        data.annotations.as_coco(),
        data.category_ids,
        max_detections=cfg.TEST.DETECTIONS_PER_IMAGE,
    )
    for record in load_records(name):
        if not data.annotations.has_annotations:
            continue
        objects = expected[key(record["file_name"], expected)]
        boxes = torch.tensor([box for _, box in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        detections = Instances((record["height"], record["width"]))
        detections.pred_boxes = Boxes(boxes)
        detections.scores = torch.full((len(objects),), 0.9)
        detections.pred_classes = torch.tensor([classes.index(n) for n, _ in objects], dtype=int)
        evaluator.process([record], [{"instances": detections}])
    results = evaluator.evaluate()
    if data.annotations.has_annotations:
        assert math.isclose(results["bbox"]["AP"], 100)
    else:
        assert not results


@pytest.mark.parametrize(
    "name",
    [
        "all_ids_from_0",
        "photograph_on_its_side_annotated_as_stored",
        "box_is_nan",
        "missing_image_whose_name_has_a_line_end",
        "jpeg_cut_short",
    ],
)
def test_training_program(name, train_net, tmp_path):
    (kind,) = (kind for kind in KINDS if kind.name == name)
    options = [*TINY, *declare(kind, tmp_path / "odd"), "OUTPUT_DIR", str(tmp_path / "run")]
    options += ["SOLVER.MAX_ITER", "1", "SOLVER.STEPS", "()"]
    done = train_net("--config-file", "configs/deformable_detr.yaml", *options)
    output = done.stdout + done.stderr
    assert "Traceback" not in output, output[-3000:]
    if kind.refused:
        assert done.returncode == 2
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert re.search(kind.refused, line)
    else:
        assert done.returncode == 0, output[-3000:]
        assert re.search(kind.said, output)
        metrics = (tmp_path / "run" / "metrics.json").read_text().splitlines()
        assert "bbox/AP" in json.loads(metrics[-1])
