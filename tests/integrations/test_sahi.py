"""A detector in SAHI. Needs: pip install sahi."""

from ddetr_d2 import Detector

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("sahi")

from ddetr_d2.integrations.sahi import DetrDetectionModel  # noqa: E402

from sahi.predict import get_prediction, get_sliced_prediction  # noqa: E402

THRESHOLD = 0.1


def rows(instances, shift=(0, 0)):
    """Class, score and box of detections, boxes cut off at the border."""
    instances.pred_boxes.clip(instances.image_size)
    keep = (instances.scores >= THRESHOLD) & instances.pred_boxes.nonempty()
    instances = instances[keep]
    boxes = instances.pred_boxes.tensor.numpy() + np.tile(shift, 2)
    return np.column_stack([instances.pred_classes, instances.scores, boxes])


def rows_of(result):
    return np.array(
        [[p.category.id, p.score.value, *p.bbox.to_xyxy()] for p in result.object_prediction_list]
    )


def assert_same(actual, wanted):
    """In any order."""
    assert len(wanted) > 5
    np.testing.assert_allclose(
        actual[np.lexsort(actual.T[:2])], wanted[np.lexsort(wanted.T[:2])], rtol=0, atol=2e-3
    )


@pytest.mark.parametrize("array_format", ["RGB", "BGR"])
@pytest.mark.parametrize("kind", ["file", "array", "image"])
def test_colours_are_the_detectors_own(checkpoint, photo, array_format, kind):
    detector = Detector(checkpoint, array_format=array_format)
    wanted = rows(detector(photo))
    image = Image.open(photo)
    swapped = rows(detector(Image.fromarray(np.asarray(image)[:, :, ::-1])))
    assert abs(swapped[:5, 1] - wanted[:5, 1]).max() > 0.02  # colours matter

    model = DetrDetectionModel(detector, confidence_threshold=THRESHOLD)
    given = {"file": str(photo), "array": np.asarray(image), "image": image}[kind]
    result = get_prediction(given, model)
    assert_same(rows_of(result), wanted)
    names = {p.category.id: p.category.name for p in result.object_prediction_list}
    assert names.items() <= {0: "circle", 1: "square", 2: "star"}.items()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_tiles(checkpoint, photo, batch_size):
    detector = Detector(checkpoint)
    model = DetrDetectionModel(detector, confidence_threshold=THRESHOLD)
    result = get_sliced_prediction(
        str(photo),
        model,
        slice_height=80,
        slice_width=80,
        overlap_height_ratio=0.5,
        overlap_width_ratio=0,
        perform_standard_pred=False,
        postprocess_type="NMS",
        postprocess_match_metric="IOU",
        postprocess_match_threshold=1.0,  # detections are not merged
        batch_size=batch_size,
        verbose=0,
    )
    pixels = np.asarray(Image.open(photo))
    tiles = [(x, y) for y in (0, 40) for x in (0, 80)]
    wanted = [rows(detector(pixels[y : y + 80, x : x + 80]), (x, y)) for x, y in tiles]
    assert_same(rows_of(result), np.concatenate(wanted))


def test_sahis_options(checkpoint, photo):
    """A threshold for one call, and other numbers for the classes."""
    remapping = {"0": 10, "1": 11, "2": 12}
    model = DetrDetectionModel(Detector(checkpoint), category_remapping=remapping)
    every = get_prediction(str(photo), model, confidence_threshold=0.0).object_prediction_list
    some = get_prediction(str(photo), model).object_prediction_list
    assert 0 < len(some) < len(every)
    assert min(p.score.value for p in some) >= 0.3
    assert {p.category.id for p in every} == {10, 11, 12}
