"""The comparison that decides whether an exported file is kept."""

from ddetr_d2.export import ExportableDetector, compare, example_inputs

import pytest
import torch


@pytest.fixture(params=["deformable_detr_refine", "detr"])
def detector(build, request):
    return ExportableDetector(build(request.param), sampling="operator")


def changed(detector, change):
    def run(*inputs):
        outputs = [tensor.clone() for tensor in detector(*inputs)]
        return change(*outputs)

    return compare(detector, run, example_inputs(detector, (70, 66), (90, 80)))


# Scores of this one differ by more than the limit below.
@pytest.mark.parametrize("detector", ["deformable_detr_refine"], indirect=True)
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


@pytest.mark.parametrize(
    "variant, stride", [("deformable_detr", 64), ("detr", 32), ("detr_dc5_plus", 16)]
)
def test_stride_of_the_coarsest_level(variant, stride, build):
    assert ExportableDetector(build(variant)).coarsest_stride == stride


def test_a_class_that_is_not_the_best_of_its_query(build):
    """Of a softmax, each query has one class: another one, with its own score, is wrong."""
    detector = ExportableDetector(build("detr"), sampling="operator")

    def second_best(scores, labels, boxes):
        inputs = example_inputs(detector, (70, 66), (90, 80))
        images, padding_mask = detector.prepare(*inputs[:2])
        logits = detector.model.predict(images, padding_mask)[0][-1].logits
        best = logits.softmax(-1)[..., :-1].topk(2, dim=-1)
        order = best.values[..., 0].argsort(descending=True)
        last = order[:, -1:]  # the last detection, so that the order of scores stays
        labels[:, -1:] = best.indices[..., 1].gather(1, last)
        scores[:, -1:] = best.values[..., 1].gather(1, last)
        return scores, labels, boxes

    assert max(changed(detector, second_best)) > 1e-3


@pytest.mark.parametrize("variant", ["deformable_detr_refine", "detr"])
def test_detector_leaves_the_model_as_it_was_and_agrees_with_it(variant, build):
    model = build(variant).train()
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
