"""DETR, the baseline that deformable attention is measured against."""

from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from ..errors import UserError
from .checkpointing import checkpointed_parts
from .dense_layers import DenseDecoderLayer, DenseEncoderLayer
from .feature_levels import FeatureProjection
from .heads import PRIOR_PROBABILITY, DetectionHead
from .queries import LearnedPositions
from .set_detector import (
    SetDetector,
    num_outputs,
    shared_arguments,
    start_equal,
    transformer_size,
)
from .transformer import Decoder, Encoder, Transformer


@META_ARCH_REGISTRY.register()
class DETR(SetDetector):
    """DETR (Carion et al., ECCV 2020, arXiv 2005.12872).

    DC5, and the focal loss of DETR-DC5+, are choices of configuration. Keys that it shares with
    Deformable DETR are those under MODEL.DEFORMABLE_DETR.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments of :class:`SetDetector`.

        Raises:
            UserError: the configuration asks for what DETR does not have, or sizes under
                MODEL.DEFORMABLE_DETR do not go together.
        """
        node = cfg.MODEL.DEFORMABLE_DETR
        _check(node)
        arguments = shared_arguments(cfg)
        (feature,) = node.IN_FEATURES
        channels = arguments["backbone"].output_shape()[feature].channels
        size = transformer_size(cfg)
        encoder = Encoder(
            [DenseEncoderLayer(size) for _ in range(node.ENC_LAYERS)],
            checkpoint="encoder" in checkpointed_parts(cfg),
        )
        # Independent classes are rare at first, as the focal loss wants them; a softmax knows.
        prior_probability = PRIOR_PROBABILITY if node.CLASS_LOSS == "focal" else None
        head = DetectionHead(
            node.HIDDEN_DIM,
            num_outputs(cfg),
            prior_probability=prior_probability,
            size_bias=None,
        )
        decoder = Decoder(
            [DenseDecoderLayer(size) for _ in range(node.DEC_LAYERS)],
            [head],
            norm=nn.LayerNorm(node.HIDDEN_DIM),
            checkpoint="decoder" in checkpointed_parts(cfg),
        )
        if node.LAYERS_START_EQUAL:
            start_equal(encoder.layers)
            start_equal(decoder.layers)
        projection = nn.Sequential(nn.Conv2d(channels, node.HIDDEN_DIM, kernel_size=1))
        queries = LearnedPositions(node.NUM_QUERIES, node.HIDDEN_DIM)
        return arguments | {
            "projection": FeatureProjection(
                [projection], node.HIDDEN_DIM, level_embed=False, pixel_center=1.0
            ),
            "transformer": Transformer(encoder, queries, decoder),
        }


def _check(node: CfgNode) -> None:
    """Refuse what only Deformable DETR has."""
    prefix = "MODEL.DEFORMABLE_DETR."
    remedy = (
        "DETR does not have that; leave it out, or choose a configuration of Deformable DETR "
        "(MODEL.META_ARCHITECTURE DeformableDETR)."
    )
    for key in ("WITH_BOX_REFINE", "TWO_STAGE"):
        if node[key]:
            raise UserError(f"{prefix}{key} is True, but {remedy}")
    if node.NUM_FEATURE_LEVELS != 1 or len(node.IN_FEATURES) != 1:
        raise UserError(
            f"{prefix}NUM_FEATURE_LEVELS is {node.NUM_FEATURE_LEVELS} and IN_FEATURES "
            f"{', '.join(node.IN_FEATURES)}: DETR reads one feature as one level; give one of "
            "each, or choose a configuration of Deformable DETR (MODEL.META_ARCHITECTURE "
            "DeformableDETR)."
        )
