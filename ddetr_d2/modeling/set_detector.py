"""What DETR and Deformable DETR share: images in, losses or detections out.

::

    images -> backbone -> projection -> transformer -> criterion, or detections
              features    levels        predictions

Projection and transformer are the member's own.
"""

from collections.abc import Iterable
from typing import Any

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import Backbone
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torchvision.ops import box_convert

from ..errors import UserError
from .backbone import build_detr_backbone
from .classification import BatchCounts, SigmoidClasses, SoftmaxClasses
from .criterion import SetCriterion
from .feature_levels import FeatureProjection
from .heads import Detections, Predictions
from .matcher import HungarianMatcher, Target
from .transformer import Transformer, TransformerSize

CLASS_LOSSES = ("focal", "cross_entropy")


class SetDetector(nn.Module):
    """A detector that predicts a set of boxes, each query one object or none.

    A member of the family has a ``from_config`` of its own, which adds projection and transformer
    to :func:`shared_arguments`.
    """

    backbone: Backbone
    pixel_mean: Tensor
    pixel_std: Tensor

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        projection: FeatureProjection,
        transformer: Transformer,
        criterion: SetCriterion,
        in_features: list[str],
        pixel_mean: list[float],
        pixel_std: list[float],
        num_queries: int,
        num_detections: int = 100,
    ):
        """
        Args:
            backbone: (N, 3, H, W) to a dict of features.
            projection: backbone features to the levels of the transformer.
            transformer: levels to predictions.
            criterion: predictions and targets to losses.
            in_features: names of the backbone features used, fine to coarse.
            pixel_mean: mean of each channel, subtracted from the input.
            pixel_std: standard deviation of each channel, the input is divided by.
            num_queries: queries of each image.
            num_detections: detections kept per image.
        """
        super().__init__()
        # Convolutions are faster with channels last, and tokens are made of it without a copy.
        for module in (backbone, projection):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.backbone = backbone
        self.projection = projection
        self.transformer = transformer
        self.criterion = criterion
        self.in_features = in_features
        self.num_queries = num_queries
        self.num_detections = num_detections
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @property
    def device(self) -> torch.device:
        """Where the model is; inputs are brought there."""
        return self.pixel_mean.device

    def forward(
        self, batched_inputs: list[dict], counts: BatchCounts | None = None
    ) -> dict[str, Tensor] | list[dict]:
        """
        Args:
            batched_inputs: one dict per image as Detectron2's DatasetMapper makes it: ``image``
                (3, H, W); ``instances`` with ``gt_boxes`` and ``gt_classes`` in training;
                ``height`` and ``width`` of the wanted output otherwise.
            counts: what the losses are divided by; the numbers of these images by default.

        Returns:
            In training a dict of losses, else ``[{"instances": Instances}]`` with
            ``pred_boxes`` in pixels of the output, ``scores``, ``pred_classes`` and the
            ``queries`` they come from, the best first.
        """
        images = self.preprocess_image(batched_inputs)
        layers, proposals = self.predict(images.tensor, self._padding_mask(images))
        if self.training:
            targets = [self._target(x["instances"]) for x in batched_inputs]
            return self.criterion(layers, proposals, targets, counts)
        return self.postprocess(layers[-1], batched_inputs, images.image_sizes)

    def predict(
        self, images: Tensor, padding_mask: Tensor | None
    ) -> tuple[list[Predictions], Predictions | None]:
        """The model between its tensors, without lists of images and without losses.

        Args:
            images: (N, 3, H, W), normalised, padded at the right and the bottom.
            padding_mask: (N, H, W) bool, True on padding; None where there is none.

        Returns:
            the predictions of every decoder layer, the final ones last, and the encoder's
            proposals if it makes any.
        """
        features = self.backbone(images.contiguous(memory_format=torch.channels_last))
        levels = self.projection([features[name] for name in self.in_features], padding_mask)
        return self.transformer(levels)

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        """Normalise the images and pad them at the right and the bottom to one size."""
        images = [
            (x["image"].to(self.device, non_blocking=True) - self.pixel_mean) / self.pixel_std
            for x in batched_inputs
        ]
        return ImageList.from_tensors(
            images,
            self.backbone.size_divisibility,
            padding_constraints=self.backbone.padding_constraints,
        )

    @staticmethod
    def _padding_mask(images: ImageList) -> Tensor | None:
        """(N, H, W) bool, True on padding; None if the images have none."""
        tensor = images.tensor
        if all(tuple(size) == tensor.shape[-2:] for size in images.image_sizes):
            return None
        mask = torch.ones(
            (tensor.shape[0], *tensor.shape[-2:]), dtype=torch.bool, device=tensor.device
        )
        for image_mask, (height, width) in zip(mask, images.image_sizes, strict=True):
            image_mask[:height, :width] = False
        return mask

    def _target(self, instances: Instances) -> Target:
        height, width = instances.image_size
        boxes = instances.gt_boxes.tensor
        boxes = boxes.to(torch.promote_types(boxes.dtype, self.pixel_mean.dtype))
        boxes = boxes / boxes.new_tensor([width, height, width, height])
        # Computed on the host, where the data are, and copied without waiting for a GPU.
        return Target(
            instances.gt_classes.to(self.device, non_blocking=True),
            box_convert(boxes, "xyxy", "cxcywh").to(self.device, non_blocking=True),
        )

    def best(self, predictions: Predictions) -> Detections:
        """Choose the detections of each image."""
        best = self.criterion.matcher.classification.best(predictions.logits, self.num_detections)
        boxes = predictions.boxes.gather(1, best.queries[..., None].expand(-1, -1, 4))
        return Detections(
            best.scores, best.classes, box_convert(boxes, "cxcywh", "xyxy"), best.queries
        )

    def postprocess(
        self,
        predictions: Predictions,
        batched_inputs: list[dict],
        image_sizes: list[tuple[int, int]],
    ) -> list[dict]:
        """Detections with boxes in pixels of the original images."""
        detections = self.best(predictions)
        results = []
        for index, (inputs, image_size) in enumerate(zip(batched_inputs, image_sizes, strict=True)):
            height = inputs.get("height", image_size[0])
            width = inputs.get("width", image_size[1])
            result = Instances((height, width))
            result.pred_boxes = Boxes(detections.boxes[index])
            result.pred_boxes.scale(width, height)
            result.scores = detections.scores[index]
            result.pred_classes = detections.classes[index]
            result.queries = detections.queries[index]
            results.append({"instances": result})
        return results


def shared_arguments(cfg: CfgNode) -> dict[str, Any]:
    """Arguments of :class:`SetDetector` but for projection and transformer.

    Raises:
        UserError: sizes under MODEL.DEFORMABLE_DETR do not go together.
    """
    node = cfg.MODEL.DEFORMABLE_DETR
    if node.NUM_CLASSES < 1:
        raise ValueError(
            "MODEL.DEFORMABLE_DETR.NUM_CLASSES is not set; give it, or let "
            "ddetr_d2.engine.setup_cfg take it from the training set"
        )
    backbone = build_detr_backbone(cfg)
    _check(node, list(backbone.output_shape()))
    # What is minimised is what is matched.
    weights = (node.CLASS_WEIGHT, node.L1_WEIGHT, node.GIOU_WEIGHT)
    matcher = HungarianMatcher(_classification(node), *weights)
    return {
        "backbone": backbone,
        "criterion": SetCriterion(matcher, *weights),
        "in_features": node.IN_FEATURES,
        "pixel_mean": cfg.MODEL.PIXEL_MEAN,
        "pixel_std": cfg.MODEL.PIXEL_STD,
        "num_queries": node.NUM_QUERIES,
        "num_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
    }


def num_outputs(cfg: CfgNode) -> int:
    """Class scores per query: one per class, and that of "no object" where there is a softmax."""
    node = cfg.MODEL.DEFORMABLE_DETR
    return node.NUM_CLASSES + _classification(node).extra_outputs


def transformer_size(cfg: CfgNode) -> TransformerSize:
    """Widths and counts of the transformer's layers."""
    node = cfg.MODEL.DEFORMABLE_DETR
    return TransformerSize(
        hidden_dim=node.HIDDEN_DIM,
        num_heads=node.NUM_HEADS,
        dim_feedforward=node.DIM_FEEDFORWARD,
        dropout=node.DROPOUT,
    )


def _classification(node: CfgNode) -> SigmoidClasses | SoftmaxClasses:
    if node.CLASS_LOSS not in CLASS_LOSSES:
        raise UserError(
            f"MODEL.DEFORMABLE_DETR.CLASS_LOSS is {node.CLASS_LOSS!r}; expected one of "
            + ", ".join(CLASS_LOSSES)
        )
    if node.CLASS_LOSS == "focal":
        return SigmoidClasses(node.FOCAL_ALPHA, node.FOCAL_GAMMA)
    return SoftmaxClasses(node.NO_OBJECT_WEIGHT)


def start_equal(modules: Iterable[nn.Module]) -> None:
    """Give all modules the weights of the first."""
    modules = [*modules]
    for module in modules[1:]:
        module.load_state_dict(modules[0].state_dict())


def _check(node: CfgNode, features: list[str]) -> None:
    """Refuse sizes under MODEL.DEFORMABLE_DETR that do not go together."""
    prefix = "MODEL.DEFORMABLE_DETR."
    absent = [name for name in node.IN_FEATURES if name not in features]
    if absent:
        raise UserError(
            f"{prefix}IN_FEATURES names {', '.join(absent)}, but the backbone gives "
            f"{', '.join(features)}; see MODEL.RESNETS.OUT_FEATURES."
        )
    for divisor, reason in ((4, "sines and cosines of x and y"), (node.NUM_HEADS, "NUM_HEADS")):
        if divisor < 1 or node.HIDDEN_DIM % divisor:
            raise UserError(
                f"{prefix}HIDDEN_DIM is {node.HIDDEN_DIM}; it must be a multiple of {divisor} "
                f"({reason})."
            )
