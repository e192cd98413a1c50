"""Prediction heads."""

import math

import torch

from ddetr_d2.modeling.heads import DetectionHead, inverse_sigmoid


def test_inverse_sigmoid_inverts_and_stays_finite():
    x = torch.linspace(0.01, 0.99, 9)
    torch.testing.assert_close(inverse_sigmoid(x).sigmoid(), x)
    extremes = inverse_sigmoid(torch.tensor([-1.0, 0.0, 1.0, 2.0]))
    limit = math.log(1e-5)
    torch.testing.assert_close(extremes, torch.tensor([limit, limit, -limit, -limit]))


def test_initial_predictions():
    head = DetectionHead(hidden_dim=32, num_classes=7, size_bias=-2.0)
    torch.nn.init.zeros_(head.class_embed.weight)
    reference = torch.tensor([[[0.2, 0.7]]])
    logits, boxes = head(torch.randn(1, 1, 32), inverse_sigmoid(reference))
    torch.testing.assert_close(logits.sigmoid(), torch.full((1, 1, 7), 0.01))
    size = 1 / (1 + math.exp(2.0))
    torch.testing.assert_close(boxes, torch.tensor([[[0.2, 0.7, size, size]]]))

    head = DetectionHead(hidden_dim=32, num_classes=7)
    reference = torch.tensor([[[0.2, 0.7, 0.1, 0.3]]])
    torch.testing.assert_close(
        head(torch.randn(1, 1, 32), inverse_sigmoid(reference)).boxes, reference
    )
