"""The meta-architecture: images in, losses or detections out."""

from collections.abc import Sequence

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torchvision.ops import box_convert

from ..errors import UserError
from .backbone import build_detr_backbone
from .criterion import SetCriterion
from .feature_levels import FeatureProjection
from .heads import DetectionHead, Detections, Predictions, at_least_float, at_most
from .matcher import HungarianMatcher, Target
from .queries import EncoderProposals, LearnedQueries
from .transformer import (
    DeformableTransformer,
    DeformableTransformerDecoder,
    DeformableTransformerEncoder,
    TransformerSize,
)


@META_ARCH_REGISTRY.register()
class DeformableDETR(nn.Module):
    """Deformable DETR (Zhu et al., ICLR 2021, arXiv 2010.04159).

    Single scale, DC5, iterative box refinement and two-stage are choices of configuration, see
    :func:`ddetr_d2.add_deformable_detr_config`.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        projection: FeatureProjection,
        transformer: DeformableTransformer,
        criterion: SetCriterion,
        in_features: list[str],
        pixel_mean: list[float],
        pixel_std: list[float],
        num_detections: int = 100,
    ):
        """
        Args:
            backbone: a Detectron2 backbone, (N, 3, H, W) to a dict of features.
            projection: backbone features to the levels of the transformer.
            transformer: levels to predictions.
            criterion: predictions and targets to losses.
            in_features: names of the backbone features used, fine to coarse.
            pixel_mean: mean of each channel, subtracted from the input.
            pixel_std: standard deviation of each channel, the input is divided by.
            num_detections: detections kept per image.
        """
        super().__init__()
        # Convolutions are faster with channels last, and tokens are made of it without a copy.
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.projection = projection.to(memory_format=torch.channels_last)
        self.transformer = transformer
        self.criterion = criterion
        self.in_features = in_features
        self.num_detections = num_detections
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.DEFORMABLE_DETR
        if node.NUM_CLASSES < 1:
            raise ValueError(
                "MODEL.DEFORMABLE_DETR.NUM_CLASSES is not set; give it, or let "
                "ddetr_d2.engine.setup_cfg take it from the training set"
            )
        backbone = build_detr_backbone(cfg)
        shapes = backbone.output_shape()
        _check(node, list(shapes))
        size = TransformerSize(
            hidden_dim=node.HIDDEN_DIM,
            num_heads=node.NUM_HEADS,
            num_levels=node.NUM_FEATURE_LEVELS,
            dim_feedforward=node.DIM_FEEDFORWARD,
            dropout=node.DROPOUT,
        )

        def head(size_bias: float) -> DetectionHead:
            return DetectionHead(node.HIDDEN_DIM, node.NUM_CLASSES, size_bias)

        # Proposals bring sizes of their own; learned queries start from small boxes.
        first_bias = 0.0 if node.TWO_STAGE else -2.0
        later_heads = node.DEC_LAYERS - 1 if node.WITH_BOX_REFINE else 0
        if node.TWO_STAGE:
            queries = EncoderProposals(node.NUM_QUERIES, node.HIDDEN_DIM, head(0.0))
        else:
            queries = LearnedQueries(node.NUM_QUERIES, node.HIDDEN_DIM)
        projection = FeatureProjection(
            [shapes[name].channels for name in node.IN_FEATURES],
            node.NUM_FEATURE_LEVELS,
            node.HIDDEN_DIM,
        )
        encoder = DeformableTransformerEncoder(size, node.ENC_LAYERS, node.ENC_POINTS)
        decoder = DeformableTransformerDecoder(
            size,
            node.DEC_LAYERS,
            node.DEC_POINTS,
            [head(first_bias)] + [head(0.0) for _ in range(later_heads)],
            node.INVERSE_SIGMOID_EPS,
        )
        if node.LAYERS_START_EQUAL:
            _start_equal(encoder.layers)
            _start_equal(decoder.layers)
        if node.HEADS_START_EQUAL:
            heads = [*decoder.heads, *([queries.head] if node.TWO_STAGE else [])]
            # The last box layer starts from zeros and the size bias of its own head.
            for name in ("class_embed", "bbox_embed.0", "bbox_embed.3"):
                _start_equal([head.get_submodule(name) for head in heads])
        weights = (  # what is minimised is what is matched
            node.CLASS_WEIGHT,
            node.L1_WEIGHT,
            node.GIOU_WEIGHT,
            node.FOCAL_ALPHA,
            node.FOCAL_GAMMA,
        )
        return {
            "backbone": backbone,
            "projection": projection,
            "transformer": DeformableTransformer(encoder, queries, decoder),
            "criterion": SetCriterion(HungarianMatcher(*weights), *weights),
            "in_features": node.IN_FEATURES,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "num_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    @property
    def device(self) -> torch.device:
        """Where the model is; inputs are brought there."""
        return self.pixel_mean.device

    def forward(
        self, batched_inputs: list[dict], num_boxes: Tensor | None = None
    ) -> dict[str, Tensor] | list[dict]:
        """
        Args:
            batched_inputs: one dict per image as Detectron2's DatasetMapper makes it: ``image``
                (3, H, W); ``instances`` with ``gt_boxes`` and ``gt_classes`` in training;
                ``height`` and ``width`` of the wanted output otherwise.
            num_boxes: number that the losses are divided by, see :class:`SetCriterion`; that of
                these images by default, at least 1.

        Returns:
            In training a dict of losses, else ``[{"instances": Instances}]`` with
            ``pred_boxes`` in pixels of the output, ``scores``, ``pred_classes`` and the
            ``queries`` they come from, the best first.
        """
        images = self.preprocess_image(batched_inputs)
        layers, proposals = self.predict(images.tensor, self._padding_mask(images))
        if self.training:
            targets = [self._target(x["instances"]) for x in batched_inputs]
            if num_boxes is None:
                num_boxes = max(sum(len(target.labels) for target in targets), 1)
            return self.criterion(layers, proposals, targets, num_boxes)
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
        """Keep the best pairs of query and class; a query can appear with several classes."""
        scores = at_least_float(predictions.logits).sigmoid().flatten(1)
        scores, pairs = scores.topk(at_most(self.num_detections, scores.shape[1]), dim=1)
        num_classes = predictions.logits.shape[-1]
        queries = pairs // num_classes
        boxes = predictions.boxes.gather(1, queries[..., None].expand(-1, -1, 4))
        return Detections(
            scores, pairs % num_classes, box_convert(boxes, "cxcywh", "xyxy"), queries
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


def _start_equal(modules: Sequence[nn.Module]) -> None:
    """Give all modules the weights of the first."""
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
    if not 1 <= len(node.IN_FEATURES) <= node.NUM_FEATURE_LEVELS:
        raise UserError(
            f"{prefix}NUM_FEATURE_LEVELS is {node.NUM_FEATURE_LEVELS}, but there are "
            f"{len(node.IN_FEATURES)} IN_FEATURES; give at least one feature and as many levels."
        )
    for divisor, reason in ((32, "groups of the normalisation"), (node.NUM_HEADS, "NUM_HEADS")):
        if divisor < 1 or node.HIDDEN_DIM % divisor:
            raise UserError(
                f"{prefix}HIDDEN_DIM is {node.HIDDEN_DIM}; it must be a multiple of {divisor} "
                f"({reason})."
            )
    if not 0 < node.INVERSE_SIGMOID_EPS < 0.5:
        raise UserError(
            f"{prefix}INVERSE_SIGMOID_EPS is {node.INVERSE_SIGMOID_EPS}; it must be between 0 and "
            "0.5: 1e-5 in the reference implementation, 1e-3 in detrex."
        )
