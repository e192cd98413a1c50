"""The comparison that decides whether an exported file is kept."""

import pytest
import torch

from ddetr_d2.export import ExportableDetector, compare, example_inputs


@pytest.fixture
def detector(build):
    return ExportableDetector(build("deformable_detr_refine"), sampling="operator")


def changed(detector, change):
    def run(*inputs):
        outputs = [tensor.clone() for tensor in detector(*inputs)]
        return change(*outputs)

    return compare(detector, run, example_inputs(detector, (70, 66), (90, 80)))


def test_equal_detections_in_another_order(detector):
    def swap(scores, labels, boxes):
        order = torch.arange(scores.shape[1])
        order[[0, 1]] = order[[1, 0]]
        scores[:, 1] = scores[:, 0]
        return scores, labels[:, order], boxes[:, order]

    same = changed(detector, lambda *outputs: outputs)
    assert max(same) < 1e-6
    # A wrong order shows as the difference of the scores, not of the boxes.
    differences = changed(detector, swap)
    assert differences.boxes < 1e-6
    assert 1e-3 < differences.scores < 0.5


def test_box_elsewhere(detector):
    def move(scores, labels, boxes):
        boxes[1, 3, 0] += 18  # of 180 pixels
        return scores, labels, boxes

    differences = changed(detector, move)
    assert differences.scores < 1e-6
    assert differences.boxes == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize("index", [0, 19])
def test_wrong_class(detector, index):
    def relabel(scores, labels, boxes):
        labels[0, index] = (labels[0, index] + 1) % 3
        return scores, labels, boxes

    assert max(changed(detector, relabel)) > 1e-3


def test_missing_doubled_and_broken_detections(detector):
    def double(scores, labels, boxes):
        labels[:, 1], boxes[:, 1] = labels[:, 0], boxes[:, 0]
        return scores, labels, boxes

    def spoil(scores, labels, boxes):
        scores[0, 5] = float("nan")
        return scores, labels, boxes

    assert max(changed(detector, lambda *outputs: [tensor[:, 1:] for tensor in outputs])) > 1e-3
    assert max(changed(detector, double)) > 1e-3
    assert max(changed(detector, spoil)) > 1e-3


def test_raw_outputs_in_another_order(build):
    detector = ExportableDetector(build("deformable_detr"), sampling="operator", postprocess=False)
    assert max(changed(detector, lambda logits, boxes: (logits.flip(1), boxes.flip(1)))) < 1e-6
    assert max(changed(detector, lambda logits, boxes: (logits.flip(1), boxes))) > 1e-3
    assert max(changed(detector, lambda logits, boxes: (logits[:, 1:], boxes[:, 1:]))) > 1e-3


def test_detector_leaves_the_model_as_it_was_and_agrees_with_it(build):
    model = build("deformable_detr_refine").train()
    detector = ExportableDetector(model)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.eval()
    images, image_sizes, output_sizes = example_inputs(detector, (70, 66), (90, 80))
    batch = [
        {"image": image[:, :height, :width], "height": 2 * height, "width": 2 * width}
        for image, (height, width) in zip(images, image_sizes.tolist(), strict=True)
    ]
    with torch.no_grad():
        results = [result["instances"] for result in model(batch)]
        scores, labels, boxes = detector(images, image_sizes, output_sizes)
    for index, instances in enumerate(results):
        torch.testing.assert_close(scores[index], instances.scores)
        assert torch.equal(labels[index], instances.pred_classes)
        torch.testing.assert_close(boxes[index], instances.pred_boxes.tensor, atol=1e-3, rtol=0)
