"""A detector is one file and three lines."""

from ddetr_d2 import Detector
from ddetr_d2.checkpoint import DetrCheckpointer
from ddetr_d2.checkpoint.writing import to_reference, write_checkpoint, write_transformers
from ddetr_d2.data import build_augmentation
from ddetr_d2.detector import configure
from ddetr_d2.engine import setup_cfg
from ddetr_d2.errors import UserError

import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image

from .conftest import ROOT, TINY

NAMES = ["circle", "square", "star"]
CONFIG = ROOT / "configs" / "deformable_detr_refine.yaml"
# What shapes tell is left out of the options that a detector is loaded with.
SIZES = ["INPUT.MIN_SIZE_TEST", "96", "MODEL.DEVICE", "cpu"]


def make_model(config=CONFIG, *opts):
    torch.manual_seed(0)
    cfg = setup_cfg(str(config), [*TINY, *opts, "MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3"])
    model = build_model(cfg).eval()
    for head in model.transformer.decoder.heads:  # boxes and scores that differ
        torch.nn.init.normal_(head.bbox_embed[-2].weight, std=0.2)
    return cfg, model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detector")
    cfg, model = make_model()
    DetrCheckpointer(model, str(folder), class_names=NAMES, config=cfg.dump()).save("own")
    state = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    write_checkpoint(str(folder / "reference.pth"), to_reference(state))
    (folder / "transformers").mkdir()
    write_transformers(str(folder / "transformers"), state, cfg, NAMES)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "photo.png")
    return folder


def expected(folder, image):
    """By Detectron2's own predictor."""
    cfg, model = make_model()
    predictor = object.__new__(DefaultPredictor)
    predictor.cfg, predictor.model, predictor.input_format = cfg, model, cfg.INPUT.FORMAT
    (predictor.aug,) = build_augmentation(cfg, is_train=False)
    return predictor(image[:, :, ::-1])["instances"]


def assert_same(actual, wanted):
    torch.testing.assert_close(actual.scores, wanted.scores, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        actual.pred_boxes.tensor, wanted.pred_boxes.tensor, rtol=1e-3, atol=1e-2
    )
    assert actual.pred_classes.tolist() == wanted.pred_classes.tolist()


def test_a_checkpoint_is_enough(folder):
    detector = Detector(folder / "own.pth")
    assert detector.class_names == NAMES
    pixels = np.asarray(Image.open(folder / "photo.png"))
    wanted = expected(folder, pixels)
    assert len(wanted) == 60 and wanted.scores.std() > 1e-4
    for image in (str(folder / "photo.png"), folder / "photo.png", pixels, Image.fromarray(pixels)):
        assert_same(detector(image), wanted)
    bgr = Detector(str(folder / "own.pth"), array_format="BGR")
    assert_same(bgr(np.ascontiguousarray(pixels[:, :, ::-1])), wanted)
    assert (detector(pixels[:, :, ::-1]).scores - wanted.scores).abs().max() > 1e-5


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16", "L"])
def test_pil_images_of_any_mode_are_taken_as_their_files(folder, tmp_path, mode):
    image = Image.open(folder / "photo.png")
    if mode in ("RGBA", "LA"):
        image = image.convert(mode)
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    elif mode == "I;16":
        image = Image.fromarray(np.asarray(image)[..., 0].astype(np.uint16) * 40)
    else:
        image = image.convert(mode)
    assert image.mode == mode
    image.save(tmp_path / "image.png")
    detector = Detector(folder / "own.pth")
    assert_same(detector(image), detector(tmp_path / "image.png"))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_lists(folder, batch_size):
    detector = Detector(folder / "own.pth")
    image = Image.open(folder / "photo.png")
    several = detector([image, image, image], batch_size=batch_size)
    assert len(several) == 3
    for instances in several:
        assert_same(instances, detector(image))
    assert detector([]) == []


@pytest.mark.parametrize("name", ["reference.pth", "transformers"])
def test_weights_of_others_tell_the_configuration(folder, name):
    options = {
        "MODEL.DEFORMABLE_DETR.NUM_CLASSES": "3",
        "INPUT.MIN_SIZE_TEST": "96",
        "MODEL.DEVICE": "cpu",
    }
    if name == "transformers":
        options.pop("MODEL.DEFORMABLE_DETR.NUM_CLASSES")
    detector = Detector(folder / name, opts=sum(map(list, options.items()), []))
    assert detector.class_names == (NAMES if name == "transformers" else None)
    pixels = np.asarray(Image.open(folder / "photo.png"))
    assert_same(detector(pixels), expected(folder, pixels))


def test_a_configuration_that_is_given_has_to_agree(folder):
    with pytest.raises(UserError, match="does not fit this model"):
        Detector(folder / "own.pth", config="deformable_detr", opts=SIZES)
    with pytest.raises(UserError, match="there is no configuration 'deformable_dter'; did you"):
        Detector(folder / "own.pth", config="deformable_dter")


def test_drawings(folder):
    detector = Detector(folder / "own.pth")
    instances = detector(folder / "photo.png")
    drawing = detector.draw(folder / "photo.png", instances, threshold=0.0)
    blank = detector.draw(folder / "photo.png", instances, threshold=1.0)
    assert drawing.shape == blank.shape == (540, 810, 3) and drawing.dtype == np.uint8
    assert (drawing != blank).any()
    original = np.asarray(Image.open(folder / "photo.png")).astype(int)
    assert abs(blank[4::9, 4::9].astype(int) - original).mean() < 40  # red is red


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((4, 4, 3)), "an array of float64 of the shape"),
        (np.zeros((4, 4, 2), np.uint8), r"uint8 of the shape \(4, 4, 2\); uint8 of the shape"),
        ("nothing.png", "nothing.png"),
    ],
)
def test_what_is_no_image(folder, image, message):
    with pytest.raises(UserError, match=message):
        Detector(folder / "own.pth")(image)


def test_what_is_no_detector(folder, tmp_path):
    with pytest.raises(UserError, match="do not exist; check MODEL.WEIGHTS"):
        Detector(tmp_path / "absent.pth")
    _, model = make_model()
    state = {f"backbone.{k}": v for k, v in model.backbone.state_dict().items()}
    torch.save({"model": state}, tmp_path / "backbone.pth")
    with pytest.raises(UserError, match="is a backbone alone; MODEL.WEIGHTS has to name"):
        Detector(tmp_path / "backbone.pth")


def test_class_names_of_detectron2s_data_set(folder):
    opts = [*SIZES, "MODEL.WEIGHTS", str(folder / "reference.pth")]
    cfg, names, _ = configure(str(CONFIG), [*opts, "DATASETS.TEST", "('coco_2017_val',)"])
    assert names[:2] == ["person", "bicycle"]
    assert cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES == 80


def test_without_class_names_the_number_is_needed(folder):
    opts = [*SIZES, "MODEL.WEIGHTS", str(folder / "reference.pth"), "DATASETS.TEST", "()"]
    opts += ["DATASETS.TRAIN", "()"]
    with pytest.raises(UserError, match="does not name its classes.*NUM_CLASSES"):
        configure(str(CONFIG), opts)
    opts += ["MODEL.DEFORMABLE_DETR.NUM_CLASSES", "3"]
    assert configure(str(CONFIG), opts).class_names is None


def test_without_weights():
    with pytest.raises(UserError, match="no weights: give MODEL.WEIGHTS FILE"):
        configure()
