"""Tell from the shapes of weights which model they are of."""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from ..layers import MSDeformAttn
from ..modeling.backbone import STAGES
from ..modeling.classification import SigmoidClasses
from .names import is_detr
from .transformers_config import DEPTHS

_NODE = "MODEL.DEFORMABLE_DETR."
_RESNET = "MODEL.RESNETS."
META_ARCHITECTURE = "MODEL.META_ARCHITECTURE"
NUM_CLASSES = f"{_NODE}NUM_CLASSES"
NUM_HEADS = f"{_NODE}NUM_HEADS"
DILATION = f"{_RESNET}RES5_DILATION"
CLASS_LOSS = f"{_NODE}CLASS_LOSS"
MULTI_SCALE_ATTENTION = f"{_NODE}MULTI_SCALE_ATTENTION"
INVERSE_SIGMOID_EPS = f"{_NODE}INVERSE_SIGMOID_EPS"
# What decides on a model's output and shows in no shape; see :func:`built_options`.
UNTOLD = (NUM_HEADS, DILATION, CLASS_LOSS, MULTI_SCALE_ATTENTION, INVERSE_SIGMOID_EPS)


def infer_options(
    state: Mapping[str, Tensor], told: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """Configuration keys and values of the model that ``state`` is of.

    What shapes do not tell is taken from ``told``, and where that is silent to be as in published
    models: 8 attention heads, no dilation (DC5), a softmax in DETR and sigmoids in Deformable DETR,
    an encoder with as many points as the decoder. The limit of the inverse sigmoid and the number
    of queries of a two-stage model are left out then.

    Args:
        state: weights under the names of this project.
        told: configuration keys and values that are known; they are in the result too.
    """
    options: dict[str, Any] = {}
    if is_detr(state) or "projection.level_embed" in state:
        options |= _transformer_options(state, told)
    if "backbone.stem.conv1.weight" in state:
        options |= _resnet_options(state)
    return options | dict(told)


def class_outputs(state: Mapping[str, Tensor]) -> int:
    """Class outputs of a detector's state, "no object" among them; 0 for a backbone."""
    bias = state.get("transformer.decoder.heads.0.class_embed.bias")
    return 0 if bias is None else bias.shape[0]


def usual_class_loss(state: Mapping[str, Tensor]) -> str:
    """CLASS_LOSS of published models of the kind that ``state`` is of."""
    return "cross_entropy" if is_detr(state) else "focal"


def num_classes(state: Mapping[str, Tensor], told: Mapping[str, Any]) -> int:
    """Classes of a detector's state; 0 for a backbone.

    Args:
        state: weights under the names of this project.
        told: configuration keys and values that are known; CLASS_LOSS says whether there is an
            output for "no object".
    """
    outputs = class_outputs(state)
    has_no_object = told.get(CLASS_LOSS, usual_class_loss(state)) == "cross_entropy"
    return outputs - 1 if outputs and has_no_object else outputs


def _count(state: Mapping[str, Tensor], start: str) -> int:
    """How many modules are numbered after ``start``."""
    pattern = re.compile(re.escape(start) + r"\.(\d+)\.")
    return len({match[1] for match in map(pattern.match, state) if match})


def _transformer_options(state: Mapping[str, Tensor], told: Mapping[str, Any]) -> dict[str, Any]:
    if is_detr(state):
        member, levels = "DETR", 1
        hidden_dim = state["transformer.decoder.layers.0.cross_attn.in_proj_weight"].shape[1]
    else:
        member = "DeformableDETR"
        levels, hidden_dim = state["projection.level_embed"].shape
    heads = told.get(NUM_HEADS, 8)
    options = {
        META_ARCHITECTURE: member,
        f"{_NODE}HIDDEN_DIM": hidden_dim,
        f"{_NODE}NUM_FEATURE_LEVELS": levels,
        NUM_HEADS: heads,
        f"{_NODE}TWO_STAGE": "transformer.queries.enc_output.weight" in state,
        f"{_NODE}WITH_BOX_REFINE": _count(state, "transformer.decoder.heads") > 1,
        CLASS_LOSS: usual_class_loss(state),
        f"{_NODE}ENC_LAYERS": _count(state, "transformer.encoder.layers"),
        f"{_NODE}DEC_LAYERS": _count(state, "transformer.decoder.layers"),
    }
    if class_outputs(state):
        options[NUM_CLASSES] = num_classes(state, told)
    shapes = {
        "DIM_FEEDFORWARD": "transformer.decoder.layers.0.ffn.linear1.bias",
        "NUM_QUERIES": "transformer.queries.query_embed.weight",
    }
    options |= {_NODE + key: state[name].shape[0] for key, name in shapes.items() if name in state}
    encoder, decoder = (
        state.get(f"transformer.{name}.attention_weights.bias")
        for name in ("encoder.layers.0.self_attn", "decoder.layers.0.cross_attn")
    )
    if decoder is not None:
        options[f"{_NODE}DEC_POINTS"] = decoder.shape[0] // (levels * heads)
        if encoder is not None:
            separate = levels > 1 and encoder.shape[0] * levels == decoder.shape[0]
            multi_scale = told.get(MULTI_SCALE_ATTENTION, not separate)
            points = encoder.shape[0] // ((levels if multi_scale else 1) * heads)
            options |= {f"{_NODE}ENC_POINTS": points, MULTI_SCALE_ATTENTION: multi_scale}
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
        DILATION: 1,
    }
    if 0 < features <= len(stages):
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
        decoder_layer = transformer.decoder.layers[0]
        options[NUM_HEADS] = decoder_layer.self_attn.num_heads
        matcher = model.get_submodule("criterion.matcher")
        sigmoid = isinstance(matcher.classification, SigmoidClasses)
        options[CLASS_LOSS] = "focal" if sigmoid else "cross_entropy"
        if isinstance(decoder_layer.cross_attn, MSDeformAttn):
            levels = decoder_layer.cross_attn.num_levels
            options[MULTI_SCALE_ATTENTION] = all(
                layer.self_attn.num_levels == levels for layer in transformer.encoder.layers
            )
            options[INVERSE_SIGMOID_EPS] = transformer.decoder.inverse_sigmoid_eps
    backbone = getattr(model, "backbone", None)
    convolution = getattr(getattr(backbone, "res5", [None])[-1], "conv2", None)
    if convolution is not None:
        options[DILATION] = convolution.dilation[0]
    return options


def variant(options: Mapping[str, Any]) -> str:
    """Name of the file in configs/, without ``.yaml``, that comes nearest to ``options``."""
    dilated = options.get(DILATION) == 2
    if options.get(META_ARCHITECTURE) == "DETR":
        if options.get(CLASS_LOSS) == "focal":
            return "detr_dc5_plus"
        return "detr_dc5" if dilated else "detr"
    name = "deformable_detr"
    if options.get(f"{_NODE}NUM_FEATURE_LEVELS") == 1:
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
    # Lists have quotes of their own, which a shell would take away.
    return " ".join(f'{k} "{v}"' if set(v) & set(" ['(") else f"{k} {v}" for k, v in words)
