"""The same numbers as Hugging Face transformers' own ``DeformableDetrForObjectDetection``.

Both models get the same random weights, made there and converted to here or the other way round,
and the same two images of different sizes, one of them padded. Predictions of all decoder layers,
the encoder's proposals, every loss and the gradient of every parameter have to be equal.
"""

import copy
import functools
from unittest import mock

import pytest
import timm
import torch
from detectron2.config import CfgNode
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessor,
)
from transformers.loss.loss_deformable_detr import (
    DeformableDetrHungarianMatcher,
    DeformableDetrImageLoss,
)
from transformers.models.deformable_detr import modeling_deformable_detr

from .conftest import VARIANTS
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


def build_there(cfg: CfgNode) -> DeformableDetrForObjectDetection:
    """The model of ``cfg`` as transformers builds it."""
    node = cfg.MODEL.DEFORMABLE_DETR
    config = DeformableDetrConfig(
        backbone_config={
            "model_type": "timm_backbone",
            "backbone": "resnet50",
            "out_indices": [2, 3, 4] if node.NUM_FEATURE_LEVELS > 1 else [4],
            "output_stride": 16 if cfg.MODEL.RESNETS.RES5_DILATION == 2 else None,
        },
        num_labels=node.NUM_CLASSES,
        d_model=node.HIDDEN_DIM,
        encoder_layers=node.ENC_LAYERS,
        encoder_ffn_dim=node.DIM_FEEDFORWARD,
        encoder_attention_heads=node.NUM_HEADS,
        encoder_n_points=node.ENC_POINTS,
        decoder_layers=node.DEC_LAYERS,
        decoder_ffn_dim=node.DIM_FEEDFORWARD,
        decoder_attention_heads=node.NUM_HEADS,
        decoder_n_points=node.DEC_POINTS,
        num_queries=node.NUM_QUERIES,
        two_stage_num_proposals=node.NUM_QUERIES,
        num_feature_levels=node.NUM_FEATURE_LEVELS,
        with_box_refine=node.WITH_BOX_REFINE,
        two_stage=node.TWO_STAGE,
        dropout=0.0,
        auxiliary_loss=True,
        class_cost=2,
    )
    narrow = functools.partial(timm.create_model, channels=(8, 16, 32, 64))
    with mock.patch("timm.create_model", narrow):
        model = DeformableDetrForObjectDetection(config)
    if node.WITH_BOX_REFINE and not node.TWO_STAGE:
        # A new model in transformers 5.23 shares one class head among the layers even with box
        # refinement, where the reference implementation has one per layer; it loads and trains
        # either.
        for index in range(1, node.DEC_LAYERS):
            model.class_embed[index] = copy.deepcopy(model.class_embed[0])
    return model


make_deformable_pair = functools.partial(
    make_pair, build_there=build_there, their_class=DeformableDetrForObjectDetection
)


def results_there(model: DeformableDetrForObjectDetection, batch: Batch, cfg: CfgNode) -> Results:
    labels = as_labels(batch.targets)
    output = model(batch.images, pixel_mask=(~batch.padding_mask).long(), labels=labels)
    terms, predictions = dict(output.loss_dict), predictions_there(output)
    if model.config.two_stage:
        logits, boxes = output.enc_outputs_class, output.enc_outputs_coord_logits.sigmoid()
        predictions["logits of proposals"], predictions["boxes of proposals"] = logits, boxes
        # The loss of transformers 5.23 leaves the proposals out; its criterion can take them.
        config = model.config
        criterion = DeformableDetrImageLoss(
            DeformableDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost),
            config.num_labels,
            config.focal_alpha,
            ["labels", "boxes"],
        )
        labels = [{**x, "class_labels": torch.zeros_like(x["class_labels"])} for x in labels]
        extra = criterion({"logits": logits, "pred_boxes": boxes}, labels)
        terms |= {f"{name}_enc": term for name, term in extra.items()}

    losses = losses_there(terms, cfg)
    sum(losses.values()).backward()
    return Results(predictions, losses, gradients_there(model))


class TorchInDouble:
    """The module torch, but for one type."""

    float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


@pytest.fixture(params=["float32", "float64"])
def precision(request, monkeypatch) -> tuple[torch.dtype, float, int]:
    """A type, the tolerance that goes with it, and how many draws of weights and images to try.

    Gradients jump where the input of a ReLU crosses zero or a sample the border of two pixels. One
    of the many such places of a draw is within the rounding of float32 in about one draw in twenty;
    a wrong gradient is wrong in all of them. In float64 one draw will do.
    """
    if request.param == "float32":
        return torch.float32, 1e-4, 4
    # There, the embedding of the proposals' boxes is computed in float32.
    monkeypatch.setattr(modeling_deformable_detr, "torch", TorchInDouble())
    return torch.float64, 1e-9, 1


@pytest.mark.parametrize("made", ["here", "there"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_predictions_losses_and_gradients(variant, made, precision, tmp_path):
    dtype, tolerance, draws = precision
    for seed in range(draws):
        cfg, here, there = make_deformable_pair(variant, made, tmp_path, seed=seed)
        batch = make_batch(dtype, seed)
        ours = results_here(here.to(dtype), batch)
        theirs = results_there(there.to(dtype), batch, cfg)
        assert not differences(ours.predictions, theirs.predictions, tolerance)
        assert not differences(ours.losses, theirs.losses, tolerance)
        # Statistics of batch normalisation have no gradients.
        gradients = {name: theirs.gradients[name] for name in ours.gradients}
        wrong_gradients = differences(ours.gradients, gradients, tolerance)
        if not wrong_gradients:
            break
    assert not wrong_gradients


@pytest.mark.parametrize("variant", VARIANTS)
def test_from_images_to_losses_and_detections(variant, tmp_path):
    """With the image processor there at both ends."""
    cfg, here, there = make_deformable_pair(variant, "there", tmp_path)
    inputs, targets = make_inputs()
    processor = DeformableDetrImageProcessor(do_resize=False)
    images = processor(images=[x["image"] for x in inputs], return_tensors="pt")
    with torch.no_grad():
        losses = here.train()(inputs)
        found = here.eval()(inputs)
        # Annotations given to the processor of transformers 5.23 would become fractions of the
        # padded image, which is not what the model predicts.
        output = there(**images, labels=as_labels(targets))
    decoder = {name: loss for name, loss in losses.items() if not name.endswith("_enc")}
    assert not differences(decoder, losses_there(output.loss_dict, cfg), 1e-4)

    sizes = [(x["height"], x["width"]) for x in inputs]
    wanted = processor.post_process_object_detection(output, threshold=0.0, target_sizes=sizes)
    for ours, theirs, size in zip(found, wanted, sizes, strict=True):
        ours = ours["instances"]
        assert len(ours) == cfg.TEST.DETECTIONS_PER_IMAGE
        assert torch.equal(ours.pred_classes, theirs["labels"])
        torch.testing.assert_close(ours.scores, theirs["scores"], rtol=0, atol=1e-4)
        pixels = 1e-4 * max(size)
        torch.testing.assert_close(ours.pred_boxes.tensor, theirs["boxes"], rtol=0, atol=pixels)
