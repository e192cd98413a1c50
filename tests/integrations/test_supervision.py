"""A detector's results in supervision. Needs: pip install supervision."""

from ddetr_d2 import Detector

import numpy as np
import pytest
from PIL import Image

sv = pytest.importorskip("supervision")


def as_detections(detector, image, threshold):
    instances = detector(image)
    instances = instances[instances.scores >= threshold]
    instances.pred_boxes.clip(instances.image_size)  # supervision warns of boxes outside of tiles
    detections = sv.Detections.from_detectron2({"instances": instances})
    detections["class_name"] = np.array(detector.class_names)[detections.class_id]
    return instances, detections


def test_detections_and_drawing(checkpoint, photo):
    detector = Detector(checkpoint)
    pixels = np.asarray(Image.open(photo))
    instances, detections = as_detections(detector, pixels, 0.1)
    assert len(detections) == len(instances) > 5
    np.testing.assert_array_equal(detections.xyxy, instances.pred_boxes.tensor.numpy())
    np.testing.assert_array_equal(detections.confidence, instances.scores.numpy())
    names = [detector.class_names[number] for number in instances.pred_classes]
    assert detections["class_name"].tolist() == names

    drawing = sv.BoxAnnotator(thickness=1).annotate(pixels.copy(), detections)
    assert (drawing != pixels).any()
    labelled = sv.LabelAnnotator().annotate(drawing.copy(), detections)
    assert (labelled != drawing).any()


def test_tiles(checkpoint, photo):
    detector = Detector(checkpoint)
    pixels = np.asarray(Image.open(photo))

    def callback(tile):
        return as_detections(detector, tile, 0.1)[1]

    slicer = sv.InferenceSlicer(
        callback, slice_wh=(80, 60), overlap_wh=0, overlap_filter=sv.OverlapFilter.NONE
    )
    found = slicer(pixels)
    tiles = [(x, y) for y in (0, 60) for x in (0, 80)]
    wanted = [callback(pixels[y : y + 60, x : x + 80]) for x, y in tiles]
    for (x, y), detections in zip(tiles, wanted, strict=True):
        detections.xyxy += [x, y, x, y]
    wanted = sv.Detections.merge(wanted)
    order, other = np.argsort(found.confidence), np.argsort(wanted.confidence)
    np.testing.assert_allclose(found.confidence[order], wanted.confidence[other], atol=1e-5)
    np.testing.assert_allclose(found.xyxy[order], wanted.xyxy[other], atol=1e-2)
