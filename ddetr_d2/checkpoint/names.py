"""How the weights of DETR and Deformable DETR are called here and in other implementations.

A table maps names here to names there. Entries are beginnings of names that end where a part of
the name ends; ``*`` stands for a number. The prediction heads of Deformable DETR are not in the
tables: the others count them in one list, with the head of the two-stage proposals last, and store
that list twice.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

State = dict[str, Tensor]
Table = dict[str, str]

_HEAD = re.compile(r"(?:(?P<copy>.*decoder)\.)?(?P<kind>class_embed|bbox_embed)\.(?P<rest>.+)")


def _resnet(
    stem: tuple[str, str], stages: str, convs: tuple[str, str], shortcut: tuple[str, str]
) -> Table:
    """Table of a ResNet; each pair names a convolution and its normalisation.

    ``stages`` and ``convs`` are formatted with a stage or a convolution, counted from 0 (``{0}``)
    and from 1 (``{1}``).
    """
    table = {"stem.conv1": stem[0], "stem.conv1.norm": stem[1]}
    for stage in range(4):
        here, there = f"res{stage + 2}.*", stages.format(stage, stage + 1)
        for conv in range(3):
            name, norm = (f"{there}.{part.format(conv, conv + 1)}" for part in convs)
            table |= {f"{here}.conv{conv + 1}": name, f"{here}.conv{conv + 1}.norm": norm}
        table |= {f"{here}.shortcut": f"{there}.{shortcut[0]}"}
        table |= {f"{here}.shortcut.norm": f"{there}.{shortcut[1]}"}
    return table


def prefixed(table: Table, here: str, there: str) -> Table:
    """``table`` with beginnings put before the names on both sides."""
    return {here + ours: there + theirs for ours, theirs in table.items()}


def _layers(there: str, encoder: Table, decoder: Table) -> Table:
    """Tables of an encoder's and a decoder's layer, for all layers below ``there``."""
    return {
        **prefixed(encoder, "transformer.encoder.layers.*.", f"{there}encoder.layers.*."),
        **prefixed(decoder, "transformer.decoder.layers.*.", f"{there}decoder.layers.*."),
    }


def _queries(there: str) -> Table:
    parts = ("enc_output", "enc_output_norm", "pos_trans", "pos_trans_norm", "reference_points")
    return {f"transformer.queries.{part}": f"{there}{part}" for part in parts}


def _head(class_embed: str, bbox_embed: str) -> Table:
    """Table of the one head of a DETR."""
    head = "transformer.decoder.heads.0"
    linears = {f"{head}.bbox_embed.{3 * i}": f"{bbox_embed}.layers.{i}" for i in range(3)}
    return {f"{head}.class_embed": class_embed, **linears}


# ResNets of torchvision and timm, and those of Hugging Face transformers.
TORCHVISION_RESNET = _resnet(
    ("conv1", "bn1"), "layer{1}.*", ("conv{1}", "bn{1}"), ("downsample.0", "downsample.1")
)
TRANSFORMERS_RESNET = _resnet(
    ("embedder.embedder.convolution", "embedder.embedder.normalization"),
    "encoder.stages.{0}.layers.*",
    ("layer.{0}.convolution", "layer.{0}.normalization"),
    ("shortcut.convolution", "shortcut.normalization"),
)

# EfficientNets of timm, and of efficientnet_pytorch, which numbers all blocks in one list: a block
# of the first stage, one of the others, and the rest.
_EFFICIENTNET_FIRST_BLOCK = {
    "conv_dw": "_depthwise_conv",
    "bn1": "_bn1",
    "se.conv_reduce": "_se_reduce",
    "se.conv_expand": "_se_expand",
    "conv_pw": "_project_conv",
    "bn2": "_bn2",
}
_EFFICIENTNET_BLOCK = {
    "conv_pw": "_expand_conv",
    "bn1": "_bn0",
    "conv_dw": "_depthwise_conv",
    "bn2": "_bn1",
    "se.conv_reduce": "_se_reduce",
    "se.conv_expand": "_se_expand",
    "conv_pwl": "_project_conv",
    "bn3": "_bn2",
}
_EFFICIENTNET = {
    "conv_stem": "_conv_stem",
    "bn1": "_bn0",
    "conv_head": "_conv_head",
    "bn2": "_bn1",
    "classifier": "_fc",
}

_REFERENCE_ENCODER = {
    "self_attn": "self_attn",
    "norm1": "norm1",
    "ffn.linear1": "linear1",
    "ffn.linear2": "linear2",
    "ffn.norm": "norm2",
}
REFERENCE = {
    **prefixed(TORCHVISION_RESNET, "backbone.", "backbone.0.body."),
    "projection.input_proj": "input_proj",
    "projection.level_embed": "transformer.level_embed",
    "transformer.queries.query_embed": "query_embed",
    **_queries("transformer."),
    **_layers(
        "transformer.",
        encoder=_REFERENCE_ENCODER,
        decoder={
            "self_attn": "self_attn",
            "norm2": "norm2",
            "cross_attn": "cross_attn",
            "norm1": "norm1",
            "ffn.linear1": "linear1",
            "ffn.linear2": "linear2",
            "ffn.norm": "norm3",
        },
    ),
}

# The reference implementation of DETR numbers the norms of its decoder in the order of their use,
# that of Deformable DETR, as here, has the second one before the first.
REFERENCE_DETR = {
    **prefixed(TORCHVISION_RESNET, "backbone.", "backbone.0.body."),
    "projection.input_proj.0.0": "input_proj",
    "transformer.queries.query_embed": "query_embed",
    **_layers(
        "transformer.",
        encoder=_REFERENCE_ENCODER,
        decoder={
            "self_attn": "self_attn",
            "norm2": "norm1",
            "cross_attn": "multihead_attn",
            "norm1": "norm2",
            "ffn.linear1": "linear1",
            "ffn.linear2": "linear2",
            "ffn.norm": "norm3",
        },
    ),
    **_head("class_embed", "bbox_embed"),
}

DETREX = {
    "backbone": "backbone",
    "projection.input_proj.*.0": "neck.convs.*.conv",
    "projection.input_proj.*.1": "neck.convs.*.norm",
    "projection.level_embed": "transformer.level_embeds",
    "transformer.queries.query_embed": "query_embedding",
    **_queries("transformer."),
    **_layers(
        "transformer.",
        encoder={
            "self_attn": "attentions.0",
            "norm1": "norms.0",
            "ffn.linear1": "ffns.0.layers.0.0",
            "ffn.linear2": "ffns.0.layers.1",
            "ffn.norm": "norms.1",
        },
        decoder={
            "self_attn": "attentions.0.attn",
            "norm2": "norms.0",
            "cross_attn": "attentions.1",
            "norm1": "norms.1",
            "ffn.linear1": "ffns.0.layers.0.0",
            "ffn.linear2": "ffns.0.layers.1",
            "ffn.norm": "norms.2",
        },
    ),
}

# mmdetection 3, beside the names of the reference implementation.
MMDETECTION = {
    "input_proj.*.0": "neck.convs.*.conv",
    "input_proj.*.1": "neck.convs.*.gn",
    "transformer.level_embed": "level_embed",
    "query_embed": "query_embedding",
    "transformer.enc_output": "memory_trans_fc",
    "transformer.enc_output_norm": "memory_trans_norm",
    "transformer.pos_trans": "pos_trans_fc",
    "transformer.pos_trans_norm": "pos_trans_norm",
    "transformer.reference_points": "reference_points_fc",
    "class_embed": "bbox_head.cls_branches",
    **{f"bbox_embed.*.layers.{i}": f"bbox_head.reg_branches.*.{2 * i}" for i in range(3)},
    **prefixed(
        {
            "self_attn": "self_attn",
            "norm1": "norms.0",
            "linear1": "ffn.layers.0.0",
            "linear2": "ffn.layers.1",
            "norm2": "norms.1",
        },
        "transformer.encoder.layers.*.",
        "encoder.layers.*.",
    ),
    **prefixed(
        {
            "self_attn": "self_attn.attn",
            "norm2": "norms.0",
            "cross_attn": "cross_attn",
            "norm1": "norms.1",
            "linear1": "ffn.layers.0.0",
            "linear2": "ffn.layers.1",
            "norm3": "norms.2",
        },
        "transformer.decoder.layers.*.",
        "decoder.layers.*.",
    ),
}
# What its 2nd major version calls otherwise, and how the 3rd calls it.
MMDETECTION_2 = {
    "bbox_head.query_embedding": "query_embedding",
    "bbox_head.transformer.level_embeds": "level_embed",
    "bbox_head.transformer.enc_output": "memory_trans_fc",
    "bbox_head.transformer.enc_output_norm": "memory_trans_norm",
    "bbox_head.transformer.pos_trans": "pos_trans_fc",
    "bbox_head.transformer.pos_trans_norm": "pos_trans_norm",
    "bbox_head.transformer.reference_points": "reference_points_fc",
    **{
        f"bbox_head.transformer.{part}.layers.*.{theirs}": f"{part}.layers.*.{new}"
        for part in ("encoder", "decoder")
        for theirs, new in (
            ("attentions.0", "self_attn"),
            ("attentions.1", "cross_attn"),
            ("ffns.0", "ffn"),
            ("norms", "norms"),
        )
    },
}

# As transformers writes them, with a backbone of timm or (NATIVE_) of its own.
_TRANSFORMERS_LAYERS = _layers(
    "model.",
    encoder={
        "self_attn": "self_attn",
        "norm1": "self_attn_layer_norm",
        "ffn.linear1": "fc1",
        "ffn.linear2": "fc2",
        "ffn.norm": "final_layer_norm",
    },
    decoder={
        "self_attn": "self_attn",
        "norm2": "self_attn_layer_norm",
        "cross_attn": "encoder_attn",
        "norm1": "encoder_attn_layer_norm",
        "ffn.linear1": "fc1",
        "ffn.linear2": "fc2",
        "ffn.norm": "final_layer_norm",
    },
)
_TRANSFORMERS_BACKBONE = "model.backbone.conv_encoder.model."
TRANSFORMERS = {
    **prefixed(TORCHVISION_RESNET, "backbone.", _TRANSFORMERS_BACKBONE),
    "projection.input_proj": "model.input_proj",
    "projection.level_embed": "model.level_embed",
    "transformer.queries.query_embed": "model.query_position_embeddings",
    **_queries("model."),
    **_TRANSFORMERS_LAYERS,
}
TRANSFORMERS_DETR = {
    **prefixed(TORCHVISION_RESNET, "backbone.", _TRANSFORMERS_BACKBONE),
    "projection.input_proj.0.0": "model.input_projection",
    "transformer.queries.query_embed": "model.query_position_embeddings",
    **_TRANSFORMERS_LAYERS,
    "transformer.decoder.norm": "model.decoder.layernorm",
    **_head("class_labels_classifier", "bbox_predictor"),
}
_NATIVE_BACKBONE = prefixed(TRANSFORMERS_RESNET, "backbone.", _TRANSFORMERS_BACKBONE)
NATIVE_TRANSFORMERS = TRANSFORMERS | _NATIVE_BACKBONE
NATIVE_TRANSFORMERS_DETR = TRANSFORMERS_DETR | _NATIVE_BACKBONE


def rename(state: Mapping[str, Tensor], table: Table) -> State:
    """``state`` with the beginnings on the left of ``table`` replaced by those on its right.

    The longest beginning wins. Names without an entry stay as they are.
    """
    patterns = {
        re.compile(re.escape(old).replace(r"\*", r"(\d+)") + r"(?=\.|$)"): new
        for old, new in sorted(table.items(), key=lambda item: -len(item[0]))
    }

    def renamed(name: str) -> str:
        for pattern, new in patterns.items():
            match = pattern.match(name)
            if match:
                return new.replace("*", "{}").format(*match.groups()) + name[match.end() :]
        return name

    return {renamed(name): tensor for name, tensor in state.items()}


def efficientnet(state: Mapping[str, Tensor]) -> State:
    """An EfficientNet of efficientnet_pytorch under timm's names.

    Args:
        state: names such as ``_blocks.3._project_conv.weight``. A stage begins with the block that
            gives another number of channels than the one before it.
    """
    table = dict(_EFFICIENTNET)
    stage, index, channels = -1, 0, 0
    for number in range(len(state)):
        projection = state.get(f"_blocks.{number}._project_conv.weight")
        if projection is None:
            break
        if projection.shape[0] != channels:
            stage, index, channels = stage + 1, -1, projection.shape[0]
        index += 1
        expands = f"_blocks.{number}._expand_conv.weight" in state
        block = _EFFICIENTNET_BLOCK if expands else _EFFICIENTNET_FIRST_BLOCK
        table |= prefixed(block, f"blocks.{stage}.{index}.", f"_blocks.{number}.")
    return rename(state, reverse(table))


def reverse(table: Table) -> Table:
    """The table of the way back."""
    return {new: old for old, new in table.items()}


def is_detr(state: Mapping[str, Tensor]) -> bool:
    """Whether a state with names of this project is of a DETR: its decoder has dense attention."""
    return "transformer.decoder.layers.0.cross_attn.in_proj_weight" in state


def without_counters(state: Mapping[str, Tensor]) -> State:
    """``state`` without the counters of training steps that batch normalisation keeps."""
    return {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}


def is_two_stage(state: Mapping[str, Tensor]) -> bool:
    """Whether the queries of a state with names of this project are the encoder's proposals."""
    return any(name.startswith("transformer.queries.enc_output") for name in state)


def split_heads(state: Mapping[str, Tensor]) -> State:
    """Put the list of heads that other implementations have where it belongs here.

    Args:
        state: names of this project, but for ``class_embed.{i}...`` and
            ``bbox_embed.{i}.layers.{j}...`` with their copies below ``...decoder.``.
    """
    heads: dict[int, State] = {}
    result: State = {}
    refined = two_stage = is_two_stage(state)
    for name, tensor in state.items():
        match = _HEAD.fullmatch(name)
        if not match or name.startswith("transformer.decoder.heads."):
            result[name] = tensor
            continue
        index, _, rest = match["rest"].partition(".")
        if match["kind"] == "bbox_embed":
            refined |= match["copy"] is not None
            rest = re.sub(r"layers\.(\d+)", lambda m: str(3 * int(m[1])), rest)
        heads.setdefault(int(index), {})[f"{match['kind']}.{rest}"] = tensor

    numbers = sorted(heads)
    if two_stage and numbers:
        last = heads.pop(numbers.pop())
        result |= {f"transformer.queries.head.{name}": tensor for name, tensor in last.items()}
    # transformers 5 makes new models whose layers share one class head, and stores it once.
    with_classes = [n for n in numbers if any(k.startswith("class_embed.") for k in heads[n])]
    if numbers and with_classes == numbers[:1]:
        shared = {k: v for k, v in heads[numbers[0]].items() if k.startswith("class_embed.")}
        for number in numbers:
            heads[number] |= shared
    if not refined and all(_equal(heads[number], heads[numbers[0]]) for number in numbers):
        numbers = numbers[:1]
    for number in numbers:
        for name, tensor in heads[number].items():
            result[f"transformer.decoder.heads.{number}.{name}"] = tensor
    return result


def _equal(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def join_heads(state: Mapping[str, Tensor]) -> tuple[State, list[State]]:
    """Undo :func:`split_heads`.

    Returns:
        ``state`` without heads; the heads, those of the proposals last, each with the names
        ``class_embed...`` and ``bbox_embed.layers.{j}...``. A head that all layers share is
        there once.
    """
    rest: State = {}
    heads: dict[int, State] = {}
    for name, tensor in state.items():
        match = re.fullmatch(
            r"transformer\.(?:decoder\.heads\.(?P<number>\d+)|queries\.head)\.(?P<rest>.+)", name
        )
        if match is None:
            rest[name] = tensor
            continue
        number = len(state) if match["number"] is None else int(match["number"])
        within = re.sub(
            r"(?<=bbox_embed)\.(\d+)", lambda m: f".layers.{int(m[1]) // 3}", match["rest"]
        )
        heads.setdefault(number, {})[within] = tensor
    return rest, [heads[number] for number in sorted(heads)]
