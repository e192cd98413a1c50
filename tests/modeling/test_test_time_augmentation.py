"""Test-time augmentation: copies of an image are detected on, mapped back and merged."""

import json

from ddetr_d2 import Detector
from ddetr_d2.checkpoint import DetrCheckpointer
from ddetr_d2.engine import Trainer, setup_cfg
from ddetr_d2.errors import UserError
from ddetr_d2.modeling import prepare_for_inference
from ddetr_d2.modeling.test_time_augmentation import SetDetectorWithTTA, nms, soft_nms

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.evaluation.evaluator import inference_context
from detectron2.structures import Boxes, Instances
from torch import nn
from torchvision.ops import box_iou

from ..conftest import MEMBERS, ROOT, TINY
from ..test_detector import make_model
from ..test_train_net import assert_user_error, config
from .test_deformable_detr import build
from .test_inference import randomize

ENABLED = ["TEST.AUG.ENABLED", "True"]
# Of one image, no copy: everything that the model detects, as it is.
IDENTITY = [*("TEST.AUG.FLIP", "False"), *("TEST.AUG.NMS_THRESH", "1.0")]


def configured(*opts):
    return setup_cfg("", ["MODEL.DEVICE", "cpu", *opts])


def assert_same(actual, expected):
    assert actual.image_size == expected.image_size
    torch.testing.assert_close(actual.scores, expected.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        actual.pred_boxes.tensor, expected.pred_boxes.tensor, rtol=1e-3, atol=1e-2
    )
    assert actual.pred_classes.tolist() == expected.pred_classes.tolist()


@pytest.mark.parametrize("variant", MEMBERS)
def test_without_copies_it_is_the_detector(variant):
    model = randomize(build(variant, *TINY))
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    resized, _ = T.apply_augmentations([T.ResizeShortestEdge(96, 200)], pixels)
    image, resized = (torch.from_numpy(x.transpose(2, 0, 1).copy()) for x in (pixels, resized))
    with torch.no_grad():
        expected = model([{"image": resized, "height": 60, "width": 90}])[0]["instances"]
    cfg = configured(*IDENTITY, "TEST.AUG.MIN_SIZES", "(96,)", "TEST.AUG.MAX_SIZE", "200")
    for detector in (model, prepare_for_inference(model)):
        assert_same(SetDetectorWithTTA(cfg, detector)([{"image": image}])[0]["instances"], expected)


class BrightPixels(nn.Module):
    """A detector of one object, the pixels that are not black; it remembers what it was given."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.batches = []

    def forward(self, batched_inputs):
        self.batches.append([tuple(x["image"].shape[1:]) for x in batched_inputs])
        outputs = []
        for x in batched_inputs:
            height, width = x["image"].shape[1:]
            rows, columns = torch.nonzero(x["image"][0] > 127, as_tuple=True)
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            result = Instances((height, width))
            result.pred_boxes = Boxes(torch.tensor([box], dtype=torch.float))
            result.scores = torch.tensor([0.5 + width / 1000 + columns.min() / 10000])
            result.pred_classes = torch.tensor([1])
            outputs.append({"instances": result})
        return outputs


@pytest.mark.parametrize("scale", [1, 2])
def test_boxes_of_all_copies_come_back_to_the_same_place(scale):
    """Also where the image had been resized before, to a ``scale``-th of the wanted output."""
    image = torch.zeros((3, 60, 100), dtype=torch.uint8)
    image[:, 10:30, 20:30] = 255
    cfg = configured(
        *("TEST.AUG.MIN_SIZES", "(30, 60, 120)"), *("TEST.AUG.MAX_SIZE", "150"),
        *("TEST.AUG.NMS_THRESH", "1.0"),
    )  # fmt: skip
    inputs = {"image": image, "height": 60 * scale, "width": 100 * scale}
    detector = BrightPixels()
    (output,) = SetDetectorWithTTA(cfg, detector)([inputs])
    found = output["instances"]
    assert found.image_size == (60 * scale, 100 * scale)
    assert len(found) == 6 and found.pred_classes.tolist() == [1] * 6
    place = scale * torch.tensor([20.0, 10, 30, 30])
    torch.testing.assert_close(
        found.pred_boxes.tensor, place.expand(6, 4), rtol=0, atol=2.0 * scale
    )
    assert len(set(found.scores.tolist())) == 6  # those of images that differ, mirrored or not
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    assert detector.batches == [[(30, 50)] * 2, [(60, 100)] * 2, [(90, 150)] * 2]


def test_copies_come_in_pieces_of_one_size():
    cfg = configured("TEST.AUG.MIN_SIZES", "(30, 60, 60)", "TEST.AUG.MERGE", "soft_nms")
    detector = BrightPixels()
    image = torch.full((3, 60, 100), 255, dtype=torch.uint8)
    outputs = SetDetectorWithTTA(cfg, detector, batch_size=3)([{"image": image}] * 2)
    of_one = [[(30, 50)] * 2, [(60, 100)] * 3, [(60, 100)]]
    assert detector.batches == of_one * 2
    for output in outputs:
        scores = output["instances"].scores
        assert len(scores) == 6 and scores[0] == pytest.approx(0.6)
        assert scores[1] == pytest.approx(0.6 * np.exp(-2), rel=1e-4)  # the same box again


def random_detections():
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand((200, 2), generator=generator, dtype=torch.float64) * 60 - 40
    sides = torch.rand((200, 2), generator=generator, dtype=torch.float64) * 60 + 5
    scores = torch.rand(200, generator=generator, dtype=torch.float64)
    classes = torch.randint(0, 3, (200,), generator=generator)
    return torch.cat([corners, corners + sides], dim=1), scores, classes


def overlap(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (areas - width * height)


def by_the_paper(boxes, scores, classes, penalty, count):
    """Figure 2 of the paper, one class at a time; a penalty of 0 removes."""
    result = []
    for label in set(classes):
        left = [[s, i] for i, s in enumerate(scores) if classes[i] == label]
        while left:
            score, best = max(left)
            left.remove([score, best])
            result.append((score, best))
            for detection in left:
                detection[0] *= penalty(overlap(boxes[best], boxes[detection[1]]))
            left = [detection for detection in left if detection[0] > 0]
    return sorted(result, reverse=True)[:count]


@pytest.mark.parametrize("count", [20, 1000])
@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_soft_nms_is_that_of_the_paper(sigma, count):
    boxes, scores, classes = random_detections()
    expected = by_the_paper(
        *(x.tolist() for x in (boxes, scores, classes)), lambda x: np.exp(-x * x / sigma), count
    )
    indices, lowered = soft_nms(boxes, scores, classes, sigma=sigma, count=count)
    assert indices.tolist() == [index for _, index in expected]
    torch.testing.assert_close(lowered, torch.tensor([s for s, _ in expected]).double())
    assert scores.equal(random_detections()[1])  # its input stays


def test_penalties_that_leave_nothing():
    boxes = torch.tensor([[0.0, 0, 10, 10]] * 3)
    indices, scores = soft_nms(boxes, torch.ones(3), torch.zeros(3), sigma=1e-4, count=10)
    assert sorted(indices.tolist()) == [0, 1, 2]
    assert scores.tolist() == [1, 0, 0]


@pytest.mark.parametrize("count", [20, 1000])
@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_nms_removes_within_a_class(threshold, count):
    boxes, scores, classes = random_detections()
    expected = by_the_paper(
        *(x.tolist() for x in (boxes, scores, classes)), lambda x: float(x <= threshold), count
    )
    indices, kept = nms(boxes, scores, classes, threshold=threshold, count=count)
    assert indices.tolist() == [index for _, index in expected]
    torch.testing.assert_close(kept, scores[indices])


def test_classes_stay_apart_when_boxes_leave_the_image():
    """The second box, moved by its class as torchvision does, would lie on the first."""
    boxes = torch.tensor([[50.0, 50, 99, 99], [-50.0, -50, -1, -1]])
    assert box_iou(boxes[:1], boxes[1:] + 100).item() == 1
    indices, _ = nms(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), threshold=0.5, count=10)
    assert indices.tolist() == [0, 1]


def test_a_model_stays_in_its_mode():
    model = nn.Sequential(BrightPixels()).eval()
    for mode in (False, True):
        with inference_context(SetDetectorWithTTA(configured(), model.train(mode))):
            assert not model[0].training
        assert model[0].training == mode


def test_no_more_detections_than_without():
    model = randomize(build("detr", *TINY))
    cfg = configured(*ENABLED, "TEST.AUG.NMS_THRESH", "1.0", "TEST.DETECTIONS_PER_IMAGE", "7")
    cfg.TEST.AUG.MIN_SIZES = (96, 128)
    image = torch.randint(0, 256, (3, 96, 120), dtype=torch.uint8)
    for merge in ("nms", "soft_nms"):
        cfg.TEST.AUG.MERGE = merge
        (output,) = SetDetectorWithTTA(cfg, model)([{"image": image}])
        assert len(output["instances"]) == 7


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("MIN_SIZES", "()", r"MIN_SIZES is \(\); give one or more lengths"),
        ("MIN_SIZES", "(800, -1)", r"\(800, -1\); give one or more"),
        ("MIN_SIZES", "(0.5,)", r"\(0.5,\); give one or more"),
        ("MAX_SIZE", "0", "MAX_SIZE is 0"),
        ("MERGE", "wbf", "MERGE is 'wbf'; expected one of nms, soft_nms"),
        ("NMS_THRESH", "1.5", "NMS_THRESH is 1.5; give an IoU"),
        ("SOFT_NMS_SIGMA", "0.0", "SOFT_NMS_SIGMA is 0.0; give more"),
    ],
)
def test_values_that_do_not_work(key, value, message):
    cfg = configured(*ENABLED, f"TEST.AUG.{key}", value)
    with pytest.raises(UserError, match=message):
        SetDetectorWithTTA(cfg, BrightPixels())
    with pytest.raises(UserError, match=message):
        Trainer(cfg)


@pytest.mark.parametrize("mode", [[], ["--eval-only"]])
def test_the_program_refuses_them_first(mode, train_net):
    """There is no data set, which the program would complain of otherwise."""
    wrong = [*ENABLED, "TEST.AUG.MERGE", "soft-nms"]
    run = train_net(*config("deformable_detr"), *mode, *TINY, *wrong, "MODEL.WEIGHTS", "x.pth")
    assert_user_error(run, "TEST.AUG.MERGE is 'soft-nms'", "soft_nms")


def detections(folder, kind):
    (file,) = folder.glob(f"{kind}/*/coco_instances_results.json")
    found = sorted(json.loads(file.read_text()), key=lambda x: (x["image_id"], -x["score"]))
    return [[x["image_id"], x["category_id"], x["score"], *x["bbox"]] for x in found]


def assert_same_detections(actual, expected):
    """But for two: where an overlap is at NMS's threshold, rounding decides which box stays."""
    assert len(actual) == len(expected) == 200
    same = torch.isclose(
        torch.tensor(actual)[:, None], torch.tensor(expected), rtol=1e-4, atol=1e-3
    ).all(-1)
    assert same.any(0).sum() >= 198 and same.any(1).sum() >= 198


def test_evaluated_beside_the_plain_detector(train_net, shapes_opts, tmp_path):
    options = [*config("deformable_detr_refine"), *TINY, *shapes_opts, "SEED", "1"]
    options += ["INPUT.RESIZE_RULE", "detectron2", "TEST.AUG.MAX_SIZE", "1333", *ENABLED]
    two_sizes = ["TEST.AUG.MIN_SIZES", "(96, 128)"]
    run = train_net(
        *options, *two_sizes, "SOLVER.MAX_ITER", "3", "TEST.EVAL_PERIOD", "2",
        "SOLVER.BASE_LR", "0.01", "SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.DECAY", "0.5",
        "OUTPUT_DIR", str(tmp_path),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    *_, before, last = map(json.loads, (tmp_path / "metrics.json").read_text().splitlines())
    plain, added = {"bbox/AP", "ema/bbox/AP"}, {"bbox_TTA/AP", "ema/bbox_TTA/AP"}
    assert plain | added <= last.keys()
    assert plain <= before.keys() and not added & before.keys()  # after the last step only

    def evaluate(name, weights, *opts):
        opts = [*opts, "MODEL.WEIGHTS", str(tmp_path / weights), "OUTPUT_DIR", str(tmp_path / name)]
        run = train_net("--eval-only", *options, *opts)
        assert run.returncode == 0, run.stderr
        assert run.stdout.count("copypaste: AP,") == 2
        return tmp_path / name

    final = evaluate("final", "model_final.pth", *two_sizes, "INPUT.MIN_SIZE_TEST", "128")
    ema = evaluate("ema", "model_final_ema.pth", *two_sizes)
    assert_same_detections(
        detections(tmp_path, "inference_TTA"), detections(final, "inference_TTA")
    )
    averaged = detections(tmp_path, "inference_ema_TTA")
    assert_same_detections(averaged, detections(ema, "inference_TTA"))
    with pytest.raises(AssertionError):
        assert_same_detections(averaged, detections(final, "inference_TTA"))

    # Resized once, from the image of the file, whatever the plain evaluation resizes to.
    one_size = ["TEST.AUG.MIN_SIZES", "(128,)", *IDENTITY]
    identity = evaluate("identity", "model_final.pth", *one_size)
    assert_same_detections(detections(identity, "inference_TTA"), detections(final, "inference"))


def test_the_detector_detects_with_it(tmp_path):
    cfg, model = make_model(ROOT / "configs" / "deformable_detr_refine.yaml")
    cfg.INPUT.RESIZE_RULE = "detectron2"
    names = ["a", "b", "c"]
    DetrCheckpointer(model, str(tmp_path), class_names=names, config=cfg.dump()).save("model")
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)

    def detect(*opts):
        opts = ["MODEL.DEVICE", "cpu", *opts]
        return Detector(tmp_path / "model.pth", opts=opts)(pixels)

    one_size = [*ENABLED, "TEST.AUG.MIN_SIZES", "(128,)", "TEST.AUG.NMS_THRESH", "1.0"]
    assert_same(detect(*one_size, "TEST.AUG.FLIP", "False"), detect("INPUT.MIN_SIZE_TEST", "128"))
    mirrored = detect(*one_size, "TEST.DETECTIONS_PER_IMAGE", "1000")
    assert len(mirrored) == 2 * 60
    with pytest.raises(UserError, match="expected one of nms, soft_nms"):
        detect(*ENABLED, "TEST.AUG.MERGE", "none")
