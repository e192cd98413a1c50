"""The same numbers as Hugging Face transformers' own ``DetrForObjectDetection``.

Both models get the same random weights, made there and converted to here or the other way round,
and the same two images of different sizes, one of them padded. Predictions of all decoder layers,
every loss and the gradient of every parameter have to be equal.
"""

import copy
import functools
from unittest import mock

from ddetr_d2.modeling.matcher import Target

import pytest
import timm
import torch
from detectron2.config import CfgNode
from torch import Tensor
from transformers import DetrConfig, DetrForObjectDetection, DetrImageProcessor
from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

from .parity import (
    Batch,
    Results,
    as_labels,
    differences,
    gradients_there,
    losses_there,
    make_batch,
    make_inputs,
    make_pair,
    predictions_there,
    results_here,
)

VARIANTS = ["detr", "detr_dc5"]
# Queries start from zero: all have the same value, whatever the others see in them. So these have
# no gradient but for rounding.
WITHOUT_GRADIENT = "transformer.decoder.layers.0.self_attn.in_proj_weight"


def build_there(cfg: CfgNode) -> DetrForObjectDetection:
    """The model of ``cfg`` as transformers builds it."""
    node = cfg.MODEL.DEFORMABLE_DETR
    config = DetrConfig(
        backbone_config={
            "model_type": "timm_backbone",
            "backbone": "resnet50",
            "out_indices": [4],
            "output_stride": 16 if cfg.MODEL.RESNETS.RES5_DILATION == 2 else None,
        },
        num_labels=node.NUM_CLASSES,
        d_model=node.HIDDEN_DIM,
        encoder_layers=node.ENC_LAYERS,
        encoder_ffn_dim=node.DIM_FEEDFORWARD,
        encoder_attention_heads=node.NUM_HEADS,
        decoder_layers=node.DEC_LAYERS,
        decoder_ffn_dim=node.DIM_FEEDFORWARD,
        decoder_attention_heads=node.NUM_HEADS,
        num_queries=node.NUM_QUERIES,
        dropout=0.0,
    )
    narrow = functools.partial(timm.create_model, channels=(8, 16, 32, 64))
    with mock.patch("timm.create_model", narrow):
        return DetrForObjectDetection(config)


make_detr_pair = functools.partial(
    make_pair, build_there=build_there, their_class=DetrForObjectDetection
)


def predict_there(
    model: DetrForObjectDetection, images: Tensor, pixel_mask: Tensor, targets: list[Target]
) -> DetrObjectDetectionOutput:
    """Predictions and losses of all layers.

    With ``auxiliary_loss``, the decoder of transformers 5.23 hands the normalised output of each
    layer to the next one, which neither the reference implementation does nor the same model
    without. So the layers are read from outside, and normalisation, heads and loss are theirs.
    """
    outputs = []
    hooks = [
        layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        for layer in model.model.decoder.layers
    ]
    result = model(images, pixel_mask=pixel_mask)
    for hook in hooks:
        hook.remove()
    features = model.model.decoder.layernorm(torch.stack(outputs))
    logits = model.class_labels_classifier(features)
    boxes = model.bbox_predictor(features).sigmoid()
    torch.testing.assert_close(logits[-1], result.logits)
    torch.testing.assert_close(boxes[-1], result.pred_boxes)

    config = copy.deepcopy(model.config)
    config.auxiliary_loss = True
    # The weights of the classes are made in the default type.
    default = torch.get_default_dtype()
    torch.set_default_dtype(images.dtype)
    try:
        result.loss, result.loss_dict, result.auxiliary_outputs = model.loss_function(
            result.logits,
            as_labels(targets),
            images.device,
            result.pred_boxes,
            config,
            logits,
            boxes,
        )
    finally:
        torch.set_default_dtype(default)
    return result


def wrong_gradients(
    here: dict[str, Tensor], there: dict[str, Tensor], tolerance: float
) -> dict[str, float]:
    """See :func:`differences`."""
    here, there = dict(here), {name: there[name] for name in here}
    scale = there["transformer.decoder.layers.0.self_attn.in_proj_bias"].abs().max()
    for gradients in (here, there):
        assert gradients.pop(WITHOUT_GRADIENT).abs().max() <= tolerance * scale
    return differences(here, there, tolerance)


def results_there(model: DetrForObjectDetection, batch: Batch, cfg: CfgNode) -> Results:
    output = predict_there(model, batch.images, (~batch.padding_mask).long(), batch.targets)
    losses = losses_there(output.loss_dict, cfg)
    # Their weights are those here.
    torch.testing.assert_close(output.loss, sum(losses.values()))
    output.loss.backward()
    return Results(predictions_there(output), losses, gradients_there(model))


@pytest.mark.parametrize(
    "dtype, tolerance, draws", [(torch.float32, 1e-4, 4), (torch.float64, 1e-9, 1)]
)
@pytest.mark.parametrize("made, training", [("here", True), ("there", False)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_predictions_losses_and_gradients(
    variant, made, training, dtype, tolerance, draws, tmp_path
):
    # In float32 a draw whose gradients jump is drawn again, see test_transformers_parity.py.
    for seed in range(draws):
        cfg, here, there = make_detr_pair(variant, made, tmp_path, seed=seed)
        batch = make_batch(dtype, seed)
        ours = results_here(here.to(dtype).train(training), batch)
        theirs = results_there(there.to(dtype).train(training), batch, cfg)
        assert not differences(ours.predictions, theirs.predictions, tolerance)
        assert not differences(ours.losses, theirs.losses, tolerance)
        wrong = wrong_gradients(ours.gradients, theirs.gradients, tolerance)
        if not wrong:
            break
    assert not wrong


@pytest.mark.parametrize("counts", [(0, 4), (4, 0), (0, 0), (70, 2)])
def test_images_without_objects_or_with_too_many(counts, tmp_path):
    """Queries without an object have losses too, averaged by their weights."""
    cfg, here, there = make_detr_pair("detr", "there", tmp_path)
    batch = make_batch(torch.float64, 0, counts)
    ours = results_here(here.double(), batch)
    theirs = results_there(there.double(), batch, cfg)
    assert ours.losses.keys() == theirs.losses.keys()
    assert ours.losses["loss_class"] > 0
    assert (ours.losses["loss_l1"] > 0) == any(counts)
    for name in ours.losses:
        torch.testing.assert_close(ours.losses[name], theirs.losses[name], rtol=1e-9, atol=0)
    if not any(counts):  # then boxes have no gradients
        for gradients in (ours.gradients, theirs.gradients):
            boxes = [name for name in gradients if "bbox_embed" in name]
            assert len(boxes) == 6
            assert not any(gradients.pop(name).any() for name in boxes)
    assert not wrong_gradients(ours.gradients, theirs.gradients, 1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
def test_from_images_to_losses_and_detections(variant, tmp_path):
    """With the image processor there at both ends."""
    cfg, here, there = make_detr_pair(variant, "there", tmp_path)
    with torch.no_grad():  # so that "no object" is the best of many queries
        there.class_labels_classifier.bias[-1] += 3
        here.transformer.decoder.heads[0].class_embed.bias[-1] += 3
    inputs, targets = make_inputs()
    processor = DetrImageProcessor(do_resize=False)
    images = processor(images=[x["image"] for x in inputs], return_tensors="pt")
    here.num_detections = 50  # of 60 queries
    with torch.no_grad():
        losses = here.train()(inputs)
        found = here.eval()(inputs)
        output = predict_there(there, images["pixel_values"], images["pixel_mask"], targets)
    assert not differences(losses, losses_there(output.loss_dict, cfg), 1e-4)

    assert (output.logits.argmax(-1) == 5).float().mean() > 0.5

    sizes = [(x["height"], x["width"]) for x in inputs]
    wanted = processor.post_process_object_detection(output, threshold=0.0, target_sizes=sizes)
    for ours, theirs, size in zip(found, wanted, sizes, strict=True):
        ours = ours["instances"]
        # There one detection for each query, in their order; here the best first.
        assert len(theirs["scores"]) == cfg.MODEL.DEFORMABLE_DETR.NUM_QUERIES
        best = theirs["scores"].sort(descending=True).values[:50]
        torch.testing.assert_close(ours.scores, best, rtol=0, atol=1e-4)
        theirs = {name: values[ours.queries] for name, values in theirs.items()}
        torch.testing.assert_close(ours.scores, theirs["scores"], rtol=0, atol=1e-4)
        assert torch.equal(ours.pred_classes, theirs["labels"])
        pixels = 1e-4 * max(size)
        torch.testing.assert_close(ours.pred_boxes.tensor, theirs["boxes"], rtol=0, atol=pixels)
