"""Weights of Hugging Face transformers: ``DetrForObjectDetection`` and
``DeformableDetrForObjectDetection``.

Written from its published file layout; transformers itself is not needed.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor

from .names import (
    NATIVE_TRANSFORMERS,
    NATIVE_TRANSFORMERS_DETR,
    TRANSFORMERS,
    TRANSFORMERS_DETR,
    State,
    join_heads,
    rename,
    reverse,
    split_heads,
    without_counters,
)
from .transformers_config import transformers_config

# What version 5 calls otherwise in memory than in files.
_IN_MEMORY = (
    (re.compile(r"^model\.backbone\.model\."), "model.backbone.conv_encoder.model."),
    (re.compile(r"_attn\.o_proj\."), "_attn.out_proj."),
    (re.compile(r"\.mlp\.(fc[12])\."), r".\1."),
)
_ATTENTION = re.compile(r"(transformer\.\w+\.layers\.\d+\.\w+_attn)\.([qkv])_proj\.(.+)")


def is_their_detr(state: Mapping[str, Tensor]) -> bool:
    """Whether a state with names of transformers is of a DETR."""
    return any(name.startswith("class_labels_classifier.") for name in state)


def from_transformers(state: Mapping[str, Tensor]) -> State:
    """Weights under this project's names.

    Args:
        state: weights of ``DetrForObjectDetection`` or ``DeformableDetrForObjectDetection`` as in
            its files, or as its ``state_dict()`` has them; with a backbone of timm or of
            transformers.
    """
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in _IN_MEMORY:
            name = pattern.sub(replacement, name)
        renamed[name] = tensor
    if is_their_detr(state):
        table = reverse(TRANSFORMERS_DETR) | reverse(NATIVE_TRANSFORMERS_DETR)
        converted = rename(renamed, table)
    else:
        table = reverse(TRANSFORMERS) | reverse(NATIVE_TRANSFORMERS)
        converted = split_heads(rename(renamed, table))
    return without_counters(_join_attention(converted))


def to_transformers(
    state: Mapping[str, Tensor], cfg: CfgNode, class_names: Sequence[str] | None = None
) -> tuple[State, dict[str, Any]]:
    """Weights and ``config.json`` of the same model in transformers.

    Args:
        state: ``state_dict()`` of a :class:`ddetr_d2.modeling.SetDetector`.
        cfg: the configuration that the model was built with.
        class_names: name of each class; numbered where absent.

    Returns:
        contiguous weights under the names of transformers' files; its configuration.

    Raises:
        UserError: if transformers has no such model.
    """
    config = transformers_config(cfg, class_names)
    native = not config["use_timm_backbone"]
    state = without_counters(_split_attention(state))
    if cfg.INPUT.FORMAT == "BGR":  # transformers reads images as RGB
        stem = "backbone.stem.conv1.weight"
        state[stem] = state[stem].flip(1)
    if config["model_type"] == "detr":
        converted = rename(state, NATIVE_TRANSFORMERS_DETR if native else TRANSFORMERS_DETR)
    else:
        rest, heads = join_heads(state)
        converted = rename(rest, NATIVE_TRANSFORMERS if native else TRANSFORMERS)
        converted |= _list_of_heads(heads, config)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in converted.items()}, config


def _list_of_heads(heads: Sequence[State], config: Mapping[str, Any]) -> State:
    """The heads of a Deformable DETR as transformers stores them, those of the proposals last."""
    # A list that the decoder needs is stored as the decoder's, others as the detector's.
    place = {
        "class_embed": "model.decoder.class_embed" if config["two_stage"] else "class_embed",
        "bbox_embed": "model.decoder.bbox_embed" if config["with_box_refine"] else "bbox_embed",
    }
    result = {}
    for number, head in enumerate(heads):
        for name, tensor in head.items():
            kind, _, within = name.partition(".")
            result[f"{place[kind]}.{number}.{within}"] = tensor
    return result


def _join_attention(state: State) -> State:
    """Query, key and value projections as the one matrix of :class:`torch.nn.MultiheadAttention`"""
    result: State = {}
    parts: dict[str, State] = {}
    for name, tensor in state.items():
        match = _ATTENTION.fullmatch(name)
        if match:
            parts.setdefault(f"{match[1]}.in_proj_{match[3]}", {})[match[2]] = tensor
        else:
            result[name] = tensor
    for name, tensors in parts.items():
        if tensors.keys() == set("qkv"):
            result[name] = torch.cat([tensors[letter] for letter in "qkv"])
    return result


def _split_attention(state: Mapping[str, Tensor]) -> State:
    result: State = {}
    for name, tensor in state.items():
        before, found, kind = name.partition(".in_proj_")
        if found:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                result[f"{before}.{letter}_proj.{kind}"] = part
        else:
            result[name] = tensor
    return result
