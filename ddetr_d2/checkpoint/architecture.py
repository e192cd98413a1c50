"""Tell from the shapes of weights which model they are of."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..modeling.backbone import STAGES
from .transformers import DEPTHS

_NODE = "MODEL.DEFORMABLE_DETR."
_RESNET = "MODEL.RESNETS."
_HEADS = f"{_NODE}NUM_HEADS"
_DILATION = f"{_RESNET}RES5_DILATION"
INVERSE_SIGMOID_EPS = f"{_NODE}INVERSE_SIGMOID_EPS"
# What decides on a model's output and shows in no shape; see :func:`built_options`.
UNTOLD = (_HEADS, _DILATION, INVERSE_SIGMOID_EPS)


def infer_options(state: Mapping[str, Tensor], num_heads: int = 8) -> dict[str, Any]:
    """Configuration keys and values of the model that ``state`` is of.

    Shapes tell neither the attention heads nor dilation (DC5), which is taken to be absent, nor the
    limit of the inverse sigmoid and the number of queries of a two-stage model, which are left out.

    Args:
        state: weights under the names of this project.
        num_heads: attention heads, 8 in all published models.
    """
    options: dict[str, Any] = {}
    if "projection.level_embed" in state:
        options |= _transformer_options(state, num_heads)
    if "backbone.stem.conv1.weight" in state:
        options |= _resnet_options(state)
    return options


def _count(state: Mapping[str, Tensor], start: str) -> int:
    """How many modules are numbered after ``start``."""
    pattern = re.compile(re.escape(start) + r"\.(\d+)\.")
    return len({match[1] for match in map(pattern.match, state) if match})


def _transformer_options(state: Mapping[str, Tensor], num_heads: int) -> dict[str, Any]:
    levels, hidden_dim = state["projection.level_embed"].shape
    options = {
        f"{_NODE}HIDDEN_DIM": hidden_dim,
        f"{_NODE}NUM_FEATURE_LEVELS": levels,
        _HEADS: num_heads,
        f"{_NODE}TWO_STAGE": "transformer.queries.enc_output.weight" in state,
        f"{_NODE}WITH_BOX_REFINE": _count(state, "transformer.decoder.heads") > 1,
    }
    shapes = {
        "DIM_FEEDFORWARD": "transformer.encoder.layers.0.ffn.linear1.bias",
        "NUM_CLASSES": "transformer.decoder.heads.0.class_embed.bias",
        "NUM_QUERIES": "transformer.queries.query_embed.weight",
    }
    options |= {_NODE + key: state[name].shape[0] for key, name in shapes.items() if name in state}
    for short, kind, attention in (
        ("ENC", "encoder", "self_attn"),
        ("DEC", "decoder", "cross_attn"),
    ):
        layers = f"transformer.{kind}.layers"
        options[f"{_NODE}{short}_LAYERS"] = _count(state, layers)
        weights = state.get(f"{layers}.0.{attention}.attention_weights.bias")
        if weights is not None:
            options[f"{_NODE}{short}_POINTS"] = weights.shape[0] // (levels * num_heads)
    return options


def _resnet_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    blocks = [count for stage in STAGES if (count := _count(state, f"backbone.{stage}"))]
    stages = STAGES[: len(blocks)]
    features = sum(
        name.endswith(".0.weight") and tensor.shape[-1] == 1
        for name, tensor in state.items()
        if name.startswith("projection.input_proj.")
    )
    options: dict[str, Any] = {
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        f"{_RESNET}STEM_OUT_CHANNELS": state["backbone.stem.conv1.weight"].shape[0],
        _DILATION: 1,
    }
    if features:
        options[f"{_NODE}IN_FEATURES"] = list(stages[-features:])
        options[f"{_RESNET}OUT_FEATURES"] = list(stages[-features:])
    inner, last = (state.get(f"backbone.res2.0.conv{i}.weight") for i in (2, 3))
    if inner is None:
        return options
    out = inner if last is None else last
    options[f"{_RESNET}RES2_OUT_CHANNELS"] = out.shape[0]
    depths = [
        depth
        for depth, counts in DEPTHS.items()
        if counts[: len(blocks)] == blocks and (depth >= 50) == (last is not None)
    ]
    if last is not None:
        groups = inner.shape[0] // inner.shape[1]
        options[f"{_RESNET}NUM_GROUPS"] = groups
        options[f"{_RESNET}WIDTH_PER_GROUP"] = inner.shape[1]
        offsets = [state.get(f"backbone.{stage}.0.conv2_offset.weight") for stage in STAGES]
        options[f"{_RESNET}DEFORM_ON_PER_STAGE"] = [offset is not None for offset in offsets]
        if offsets[-1] is not None:
            options[f"{_RESNET}DEFORM_MODULATED"] = offsets[-1].shape[0] % 27 == 0
    elif out.shape[0] != 64 or len(blocks) < 4:
        options["MODEL.BACKBONE.NAME"] = "build_slim_resnet_backbone"
    if depths:
        options[f"{_RESNET}DEPTH"] = depths[0]
    return options


def built_options(model: nn.Module) -> dict[str, Any]:
    """What :func:`infer_options` cannot tell from shapes, read off a built detector."""
    options: dict[str, Any] = {}
    transformer = getattr(model, "transformer", None)
    if transformer is not None:
        options[_HEADS] = transformer.decoder.layers[0].self_attn.num_heads
        options[INVERSE_SIGMOID_EPS] = transformer.decoder.inverse_sigmoid_eps
    backbone = getattr(model, "backbone", None)
    convolution = getattr(getattr(backbone, "res5", [None])[-1], "conv2", None)
    if convolution is not None:
        options[_DILATION] = convolution.dilation[0]
    return options


def variant(options: Mapping[str, Any]) -> str:
    """Name of the file in configs/, without ``.yaml``, that comes nearest to ``options``."""
    name = "deformable_detr"
    if options.get(f"{_NODE}NUM_FEATURE_LEVELS") == 1:
        dilated = options.get(_DILATION) == 2
        return f"{name}_single_scale" + ("_dc5" if dilated else "")
    if options.get(f"{_NODE}WITH_BOX_REFINE") or options.get(f"{_NODE}TWO_STAGE"):
        name += "_refine"
    if not options.get(f"{_NODE}TWO_STAGE"):
        return name
    name += "_two_stage"
    if options.get(f"{_RESNET}DEPTH") != 101:
        return name
    if options.get(f"{_RESNET}NUM_GROUPS", 1) == 1:
        return f"{name}_r101"
    deformable = any(options.get(f"{_RESNET}DEFORM_ON_PER_STAGE", ()))
    return f"{name}_x101" + ("_dcn" if deformable else "")


def differences(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``wanted`` that are otherwise in ``given``."""
    return {key: value for key, value in wanted.items() if key in given and given[key] != value}


def as_arguments(options: Mapping[str, Any]) -> str:
    """``options`` as they are written on a command line."""
    words = ((key, str(value)) for key, value in options.items())
    return " ".join(f'{k} "{v}"' if " " in v else f"{k} {v}" for k, v in words)
