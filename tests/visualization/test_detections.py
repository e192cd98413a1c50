"""Detections drawn on their image."""

from ddetr_d2.visualization import detections, draw_detections

import numpy as np
import torch
from detectron2.data.catalog import Metadata
from detectron2.structures import Boxes, Instances


def test_labels_say_class_and_score(monkeypatch):
    labels = []
    monkeypatch.setattr(
        detections.Visualizer, "draw_text", lambda self, text, *_, **__: labels.append(text)
    )
    instances = Instances(
        (40, 60),
        pred_boxes=Boxes(torch.tensor([[5.0, 5.0, 25.0, 30.0]])),
        scores=torch.tensor([0.87]),
        pred_classes=torch.tensor([0]),
    )
    metadata = Metadata(thing_classes=["RBC", "WBC"], thing_colors=[[255, 0, 0]] * 2)
    drawing = draw_detections(np.zeros((40, 60, 3), np.uint8), instances, metadata)
    assert labels == ["RBC 87%"]
    assert drawing.shape[1] >= detections.MIN_DRAWING_SIZE / 2
    red, green, blue = drawing.reshape(-1, 3).max(0)
    assert red > 100 > green  # RGB
