"""The figures of both libraries, Detectron2's evaluator, and cases worked out by hand."""

import copy
import json
import logging
import math
import sys

from ddetr_d2.errors import UserError
from ddetr_d2.evaluation import CocoBoxEvaluator

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
SIZE = 400.0
RESULTS_FILE = "coco_instances_results.json"


@pytest.fixture(params=["hotcoco", "pycocotools"])
def library(request, monkeypatch) -> str:
    use_library(request.param, monkeypatch)
    return request.param


def use_library(name: str, monkeypatch) -> None:
    if name == "hotcoco":
        pytest.importorskip("hotcoco")
    else:
        monkeypatch.setitem(sys.modules, "hotcoco", None)  # importing it raises ImportError


def instances(boxes, scores, classes) -> Instances:
    """Detections; ``boxes`` are ``(N, 4)``: x, y, width, height."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    found = Instances((int(SIZE), int(SIZE)))
    found.pred_boxes = Boxes(boxes)
    found.scores = torch.tensor(scores, dtype=torch.float32)
    found.pred_classes = torch.tensor(classes, dtype=torch.int64)
    return found


def data_set(objects, images=1, category_ids=(1,)) -> dict:
    """Ground truth; ``objects`` are dicts with what differs from the first image's first class."""
    annotations = []
    for number, given in enumerate(objects, 1):
        _, _, width, height = given["bbox"]
        defaults = {"image_id": 1, "category_id": category_ids[0], "area": width * height}
        annotations.append({"id": number, "iscrowd": 0} | defaults | given)
    return {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "width": int(SIZE), "height": int(SIZE)}
            for i in range(1, images + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": c, "name": f"class {c}"} for c in category_ids],
    }


def random_case(seed, images=6, category_ids=(3, 5, 10, 11, 12, 20, 90), detections=120):
    """Ground truth with crowds, areas unlike the box's and empty images; detections of it, many of
    one score, none in some images: a dict of image ids.
    """
    rng = np.random.default_rng(seed)
    objects, found = [], {}
    for image in range(1, images + 1):
        count = 0 if image == 2 else int(rng.integers(1, 40))
        sides = np.exp(rng.uniform(np.log(5), np.log(SIZE / 2), (count, 2)))
        boxes = np.concatenate([rng.uniform(0, 1, (count, 2)) * (SIZE - sides), sides], axis=1)
        # The last category has no objects.
        classes = rng.integers(0, max(1, len(category_ids) - 1), count)
        for box, c in zip(boxes.round(2).tolist(), classes, strict=True):
            objects.append(
                {
                    "image_id": image,
                    "category_id": category_ids[c],
                    "bbox": box,
                    "area": box[2] * box[3] * float(rng.choice([1, 0.4])),
                    "iscrowd": int(rng.random() < 0.15),
                }
            )
        n = 0 if image == 3 else detections
        guesses = rng.uniform(5, SIZE / 2, (n, 4))
        guessed_classes = rng.integers(0, len(category_ids), n)
        for i in range(n if count else 0):
            if rng.random() < 0.7:
                near = rng.integers(count)
                guesses[i] = boxes[near] + 0.08 * rng.normal(size=4) * boxes[near, [2, 3, 2, 3]]
                guessed_classes[i] = classes[near]
        scores = rng.random(n) if seed % 2 else rng.integers(0, 10, n) / 10
        found[image] = instances(guesses, scores, guessed_classes)
    return data_set(objects, images, category_ids), found


def evaluate(ground_truth, found, category_ids=None, **options) -> dict:
    """Figures of detections in ``found``, a dict of image ids."""
    if category_ids is None:
        category_ids = [c["id"] for c in ground_truth["categories"]]
    evaluator = CocoBoxEvaluator("birds", ground_truth, category_ids, **options)
    run(evaluator, found)
    return evaluator.evaluate()


def run(evaluator, found) -> None:
    evaluator.reset()
    for image_id, detections in found.items():
        evaluator.process([{"image_id": image_id}], [{"instances": detections}])


def assert_same(actual: dict, expected: dict) -> None:
    """Equal to the last digit, NaN included, in the same order."""
    assert list(actual["bbox"]) == list(expected["bbox"])
    np.testing.assert_array_equal([*actual["bbox"].values()], [*expected["bbox"].values()])


@pytest.mark.parametrize("max_detections", [1, 10, 100, 300])
@pytest.mark.parametrize("seed", range(4))
def test_libraries_agree_to_the_last_digit(seed, max_detections, monkeypatch, caplog):
    # One class, so that more than 300 detections compete for the limit.
    category_ids = (7,) if seed == 0 else (3, 5, 10, 11)
    ground_truth, found = random_case(
        seed, category_ids=category_ids, detections=350 if seed == 0 else 90
    )
    before = copy.deepcopy(ground_truth)
    results = {}
    for name in ("hotcoco", "pycocotools"):
        use_library(name, monkeypatch)
        with caplog.at_level(logging.INFO):
            results[name] = evaluate(ground_truth, found, max_detections=max_detections)
        assert f"detections with {name}" in caplog.text
        caplog.clear()
    assert_same(results["hotcoco"], results["pycocotools"])
    assert 0 < results["hotcoco"]["bbox"]["AP"] < 90
    assert ground_truth == before


@pytest.mark.parametrize("max_detections", [100, 300])
def test_equals_detectron2(max_detections, library, tmp_path, caplog):
    ground_truth, found = random_case(2)
    ground_truth["images"].reverse()  # the order of the ids decides between equal scores
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(ground_truth | {"info": {}}))
    name = f"equals_detectron2_{max_detections}_{library}"
    category_ids = [c["id"] for c in ground_truth["categories"]]
    MetadataCatalog.get(name).set(
        json_file=str(path),
        thing_classes=[c["name"] for c in ground_truth["categories"]],
        thing_dataset_id_to_contiguous_id={c: i for i, c in enumerate(category_ids)},
    )
    theirs = COCOEvaluator(
        name, ("bbox",), output_dir=str(tmp_path / "theirs"), max_dets_per_image=max_detections
    )
    ours = CocoBoxEvaluator(
        name,
        ground_truth,
        category_ids,
        max_detections=max_detections,
        output_dir=str(tmp_path / "ours"),
    )
    results, tables = [], []
    for evaluator in (theirs, ours):
        run(evaluator, found)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            results.append(evaluator.evaluate())
        tables.append([r.getMessage() for r in caplog.records if "|" in r.getMessage()])
    assert_same(*reversed(results))
    assert math.isnan(results[1]["bbox"]["AP-class 90"])
    assert len(tables[0]) == 2 and tables[0] == tables[1]
    written = [
        json.loads((tmp_path / who / RESULTS_FILE).read_text()) for who in ("theirs", "ours")
    ]
    assert sorted(map(str, written[0])) == sorted(map(str, written[1]))


def two_hundred_objects() -> tuple[dict, dict]:
    boxes = [[20.0 * (i % 20), 20.0 * (i // 20), 15.0, 15.0] for i in range(200)]
    ground_truth = data_set([{"bbox": box} for box in boxes])
    return ground_truth, {1: instances(boxes, np.linspace(1, 0.5, 200), [0] * 200)}


def test_limit_on_detections(library, caplog):
    ground_truth, found = two_hundred_objects()
    ap = {m: evaluate(ground_truth, found, max_detections=m)["bbox"]["AP"] for m in (300, 200)}
    assert ap == pytest.approx({300: 100, 200: 100})
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]

    # Recall 0, 0.01 to 0.5 of 0, 0.01 to 1 is reached.
    limited = evaluate(ground_truth, found, max_detections=100)["bbox"]["AP"]
    assert limited == pytest.approx(100 * 51 / 101)
    (record,) = (r for r in caplog.records if r.levelno >= logging.WARNING)
    assert "1 of 1 images of birds have more than 100 objects (up to 200)" in record.getMessage()
    assert "TEST.DETECTIONS_PER_IMAGE" in record.getMessage()


def test_crowds_do_not_count_for_the_warning(caplog):
    ground_truth, found = two_hundred_objects()
    for annotation in ground_truth["annotations"][:100]:
        annotation["iscrowd"] = 1
    evaluate(ground_truth, found, max_detections=100)
    assert not caplog.records


def test_crowd_and_given_area(library):
    ground_truth = data_set(
        [
            {"bbox": [0.0, 0.0, 20.0, 20.0], "area": 10_000.0},  # large, whatever its box
            {"bbox": [100.0, 100.0, 200.0, 200.0], "iscrowd": 1},
        ]
    )
    boxes = [[120.0, 120.0, 20.0, 20.0], [160.0, 160.0, 20.0, 20.0], [0.0, 0.0, 20.0, 20.0]]
    result = evaluate(ground_truth, {1: instances(boxes, [0.9, 0.8, 0.7], [0, 0, 0])})["bbox"]
    assert list(result) == METRICS  # a single category has no line of its own
    assert result["AP"] == result["APl"] == pytest.approx(100)
    assert math.isnan(result["APs"]) and math.isnan(result["APm"])


@pytest.mark.parametrize(
    ("image_id", "category_id"),
    [
        (lambda i: i - 1, lambda c: c - 3),  # from 0
        (lambda i: f"{i:03}/é", lambda c: f"kind {c}"),
        (lambda i: i if i < 4 else f"{i}", lambda c: c),
    ],
    ids=["from 0", "text", "numbers and text"],
)
def test_kinds_of_ids(image_id, category_id, library, tmp_path):
    ground_truth, found = random_case(2)
    expected = evaluate(ground_truth, found)
    for image in ground_truth["images"]:
        image["id"] = image_id(image["id"])
    for category in ground_truth["categories"]:
        category["id"] = category_id(category["id"])
    for annotation in ground_truth["annotations"]:
        annotation["image_id"] = image_id(annotation["image_id"])
        annotation["category_id"] = category_id(annotation["category_id"])
    found = {image_id(i): detections for i, detections in found.items()}
    assert_same(evaluate(ground_truth, found, output_dir=str(tmp_path)), expected)
    written = json.loads((tmp_path / RESULTS_FILE).read_text())
    assert {d["image_id"] for d in written} == found.keys() - {image_id(3)}
    assert {d["category_id"] for d in written} == {c["id"] for c in ground_truth["categories"]}


def test_classes_that_the_data_set_lacks(library, tmp_path):
    ground_truth = data_set([{"bbox": [0.0, 0.0, 20.0, 20.0]}], category_ids=(4, 2))
    boxes = [[0.0, 0.0, 20.0, 20.0]] * 3
    found = {1: instances(boxes, [0.9, 0.8, 0.7], [0, 2, 1])}
    result = evaluate(ground_truth, found, [None, 4, None], output_dir=str(tmp_path))["bbox"]
    assert result["AP"] == pytest.approx(100)
    (written,) = json.loads((tmp_path / RESULTS_FILE).read_text())
    assert written["category_id"] == 4
    assert written["score"] == pytest.approx(0.7)


def test_categories_that_the_model_lacks(library):
    ground_truth, found = random_case(3)
    only = copy.deepcopy(ground_truth)
    only["categories"] = [c for c in only["categories"] if c["id"] in (10, 3)]
    only["annotations"] = [a for a in only["annotations"] if a["category_id"] in (10, 3)]
    result = evaluate(ground_truth, found, [10, None, 3, None, None, None, None])
    assert list(result["bbox"]) == [*METRICS, "AP-class 10", "AP-class 3"]
    assert_same(result, evaluate(only, found, [10, None, 3, None, None, None, None]))


@pytest.mark.parametrize("category_ids", [[1], [None]], ids=["none found", "no common class"])
def test_no_detections(category_ids, library, tmp_path, caplog):
    ground_truth = data_set([{"bbox": [0.0, 0.0, 20.0, 20.0]}])
    classes = [] if category_ids == [1] else [0]
    found = {1: instances([[0.0, 0.0, 20.0, 20.0]] * len(classes), [0.9] * len(classes), classes)}
    result = evaluate(ground_truth, found, category_ids, output_dir=str(tmp_path / "new"))["bbox"]
    assert list(result) == METRICS and all(map(math.isnan, result.values()))
    assert json.loads((tmp_path / "new" / RESULTS_FILE).read_text()) == []
    assert "no detections in birds" in caplog.text


def test_without_annotations(tmp_path, caplog):
    ground_truth, found = random_case(1)
    del ground_truth["annotations"]
    with caplog.at_level(logging.INFO):
        assert evaluate(ground_truth, found, output_dir=str(tmp_path)) == {}
    assert "birds has no annotations" in caplog.text
    assert len(json.loads((tmp_path / RESULTS_FILE).read_text())) == 5 * 120


def test_nothing_annotated(library):
    ground_truth, found = random_case(1)
    ground_truth["annotations"] = []
    assert all(map(math.isnan, evaluate(ground_truth, found)["bbox"].values()))


def test_values_that_are_not_finite(library, tmp_path, caplog):
    ground_truth = data_set([{"bbox": [0.0, 0.0, 20.0, 20.0]}])
    boxes = [[math.nan, 0.0, 5.0, 5.0], [0.0, 0.0, 20.0, 20.0], [0.0, 0.0, 20.0, 20.0]]
    found = {1: instances(boxes, [0.9, math.nan, 0.8], [0, 0, 0])}
    assert evaluate(ground_truth, found, output_dir=str(tmp_path))["bbox"]["AP"] == pytest.approx(
        100
    )
    assert "2 of 3 detections in birds" in caplog.text
    assert len(json.loads((tmp_path / RESULTS_FILE).read_text())) == 1


def test_images_of_several_processes_count_once(monkeypatch):
    ground_truth, found = random_case(1)
    expected = evaluate(ground_truth, found)
    gathered = []
    monkeypatch.setattr(comm, "gather", lambda data, dst: gathered.append(data) or gathered)
    evaluate(ground_truth, {i: found[i] for i in (2, 3, 4)})
    assert_same(evaluate(ground_truth, {i: found[i] for i in (4, 1, 5, 6)}), expected)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    assert evaluate(ground_truth, found) == {}


def test_images_seen_twice_count_once():
    ground_truth, found = random_case(1)
    evaluator = CocoBoxEvaluator(
        "birds", ground_truth, [c["id"] for c in ground_truth["categories"]]
    )
    run(evaluator, found)
    evaluator.process([{"image_id": 4}], [{"instances": found[4]}])
    assert_same(evaluator.evaluate(), evaluate(ground_truth, found))


def test_reset_forgets():
    ground_truth, found = two_hundred_objects()
    evaluator = CocoBoxEvaluator("birds", ground_truth, [1])
    run(evaluator, found)
    evaluator.reset()
    assert math.isnan(evaluator.evaluate()["bbox"]["AP"])


def test_prints_nothing(library, capfd):
    evaluate(*random_case(1))
    assert capfd.readouterr() == ("", "")


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the detections to .*file"):
        evaluate(*random_case(1), output_dir=str(tmp_path / "file" / "inference"))


def test_results_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / RESULTS_FILE).write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="No space left"):
        evaluate(*random_case(1), output_dir=str(tmp_path))
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]
