"""Deformable DETR and its variants."""

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from ..errors import UserError
from .checkpointing import checkpointed_parts
from .deformable_layers import (
    DeformableDecoderLayer,
    DeformableEncoderLayer,
    SeparateLevelsEncoderLayer,
)
from .feature_levels import FeatureProjection
from .heads import DetectionHead
from .queries import EncoderProposals, LearnedQueries
from .set_detector import (
    SetDetector,
    num_outputs,
    shared_arguments,
    start_equal,
    transformer_size,
)
from .transformer import Decoder, Encoder, Transformer

NORM_GROUPS = 32


@META_ARCH_REGISTRY.register()
class DeformableDETR(SetDetector):
    """Deformable DETR (Zhu et al., ICLR 2021, arXiv 2010.04159).

    Single scale, DC5, iterative box refinement and two-stage are choices of configuration, see
    :func:`ddetr_d2.add_deformable_detr_config`.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        """Arguments of :class:`SetDetector`.

        Raises:
            UserError: sizes under MODEL.DEFORMABLE_DETR do not go together.
        """
        node = cfg.MODEL.DEFORMABLE_DETR
        _check(node)
        arguments = shared_arguments(cfg)
        shapes = arguments["backbone"].output_shape()
        size = transformer_size(cfg)

        def head(size_bias: float) -> DetectionHead:
            return DetectionHead(node.HIDDEN_DIM, num_outputs(cfg), size_bias=size_bias)

        # Proposals bring sizes of their own; learned queries start from small boxes.
        first_bias = 0.0 if node.TWO_STAGE else -2.0
        later_heads = node.DEC_LAYERS - 1 if node.WITH_BOX_REFINE else 0
        queries: EncoderProposals | LearnedQueries
        if node.TWO_STAGE:
            queries = EncoderProposals(node.NUM_QUERIES, node.HIDDEN_DIM, head(0.0))
        else:
            queries = LearnedQueries(node.NUM_QUERIES, node.HIDDEN_DIM)
        channels = [shapes[name].channels for name in node.IN_FEATURES]
        input_proj = level_projections(channels, node.NUM_FEATURE_LEVELS, node.HIDDEN_DIM)
        levels, points = node.NUM_FEATURE_LEVELS, node.ENC_POINTS
        encoder = Encoder(
            [
                DeformableEncoderLayer(size, levels, points)
                if node.MULTI_SCALE_ATTENTION
                else SeparateLevelsEncoderLayer(size, points)
                for _ in range(node.ENC_LAYERS)
            ],
            checkpoint="encoder" in checkpointed_parts(cfg),
        )
        decoder = Decoder(
            [DeformableDecoderLayer(size, levels, node.DEC_POINTS) for _ in range(node.DEC_LAYERS)],
            [head(first_bias)] + [head(0.0) for _ in range(later_heads)],
            inverse_sigmoid_eps=node.INVERSE_SIGMOID_EPS,
            checkpoint="decoder" in checkpointed_parts(cfg),
        )
        if node.LAYERS_START_EQUAL:
            start_equal(encoder.layers)
            start_equal(decoder.layers)
        if node.HEADS_START_EQUAL:
            heads = [
                *decoder.heads,
                *([queries.head] if isinstance(queries, EncoderProposals) else []),
            ]
            # The last box layer starts from zeros and the size bias of its own head.
            for name in ("class_embed", "bbox_embed.0", "bbox_embed.3"):
                start_equal([head.get_submodule(name) for head in heads])
        return arguments | {
            "projection": FeatureProjection(input_proj, node.HIDDEN_DIM),
            "transformer": Transformer(encoder, queries, decoder),
        }


def level_projections(
    in_channels: Sequence[int], num_levels: int, hidden_dim: int
) -> list[nn.Module]:
    """Convolutions with GroupNorm that make the levels (appendix A.4, figure 4).

    Each backbone feature passes a 1x1 convolution; further levels are 3x3 convolutions of stride 2.

    Args:
        in_channels: channels of the backbone features, fine to coarse.
        num_levels: levels in all, at least ``len(in_channels)``.
        hidden_dim: width C of the tokens, a multiple of 32 (groups of the normalisation).
    """
    convolutions = [nn.Conv2d(channels, hidden_dim, kernel_size=1) for channels in in_channels]
    channels = in_channels[-1]
    for _ in range(num_levels - len(in_channels)):
        convolutions.append(nn.Conv2d(channels, hidden_dim, kernel_size=3, stride=2, padding=1))
        channels = hidden_dim
    for convolution in convolutions:
        nn.init.xavier_uniform_(convolution.weight)
        if convolution.bias is not None:
            nn.init.zeros_(convolution.bias)
    return [
        nn.Sequential(convolution, nn.GroupNorm(NORM_GROUPS, hidden_dim))
        for convolution in convolutions
    ]


def _check(node: CfgNode) -> None:
    """Refuse sizes that only this member has, and that do not go together."""
    prefix = "MODEL.DEFORMABLE_DETR."
    if not 1 <= len(node.IN_FEATURES) <= node.NUM_FEATURE_LEVELS:
        raise UserError(
            f"{prefix}NUM_FEATURE_LEVELS is {node.NUM_FEATURE_LEVELS}, but there are "
            f"{len(node.IN_FEATURES)} IN_FEATURES; give at least one feature and as many levels."
        )
    if node.HIDDEN_DIM % NORM_GROUPS:
        raise UserError(
            f"{prefix}HIDDEN_DIM is {node.HIDDEN_DIM}; it must be a multiple of {NORM_GROUPS} "
            "(groups of the normalisation)."
        )
    if not 0 < node.INVERSE_SIGMOID_EPS < 0.5:
        raise UserError(
            f"{prefix}INVERSE_SIGMOID_EPS is {node.INVERSE_SIGMOID_EPS}; it must be between 0 and "
            "0.5: 1e-5 in the reference implementation, 1e-3 in detrex."
        )
