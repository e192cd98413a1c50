"""Names of the reference implementation and of detrex, written down beside those of this project.

Taken from the modules of those projects, without a look at the tables of the converter.
"""

from collections.abc import Iterator

from torch import Tensor

State = dict[str, Tensor]
WEIGHT_AND_BIAS = ("weight", "bias")
DEFORMABLE = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")


def _torchvision(name: str) -> str:
    """Name in torchvision's ResNet of a weight of Detectron2's ``name``."""
    parts = name.split(".")
    if parts[0] == "stem":
        return f"bn1.{parts[-1]}" if "norm" in parts else f"conv1.{parts[-1]}"
    layer = f"layer{int(parts[0][-1]) - 1}.{parts[1]}"
    norm = "norm" in parts
    if parts[2] == "shortcut":
        return f"{layer}.downsample.{int(norm)}.{parts[-1]}"
    return f"{layer}.{'bn' if norm else 'conv'}{parts[2][-1]}.{parts[-1]}"


def _modules(names: dict[str, str]) -> Iterator[tuple[str, str]]:
    for ours, theirs in names.items():
        for kind in WEIGHT_AND_BIAS:
            yield f"{ours}.{kind}", f"{theirs}.{kind}"


def _heads(state: State, layers: int, two_stage: bool, refined: bool) -> State:
    """The heads as both projects store them: each in a list, and copies in the decoder."""
    result = {}
    for index in range(layers + two_stage):
        own = f"transformer.decoder.heads.{index if refined else 0}"
        if index == layers:
            own = "transformer.queries.head"
        for kind in WEIGHT_AND_BIAS:
            places = ["class_embed"] + ["transformer.decoder.class_embed"] * two_stage
            for place in places:
                result[f"{place}.{index}.{kind}"] = state[f"{own}.class_embed.{kind}"]
            places = ["bbox_embed"] + ["transformer.decoder.bbox_embed"] * refined
            for place in places:
                for linear in range(3):
                    tensor = state[f"{own}.bbox_embed.{3 * linear}.{kind}"]
                    result[f"{place}.{index}.layers.{linear}.{kind}"] = tensor
    return result


def as_reference(state: State, encoder: int, decoder: int) -> State:
    """The state of a detector of this project as the reference implementation would save it."""
    two_stage = "transformer.queries.pos_trans.weight" in state
    refined = "transformer.decoder.heads.1.class_embed.bias" in state
    result = {}
    for name, tensor in state.items():
        if name.startswith("backbone.") and not name.endswith("num_batches_tracked"):
            result[f"backbone.0.body.{_torchvision(name.removeprefix('backbone.'))}"] = tensor
    result["transformer.level_embed"] = state["projection.level_embed"]
    pairs = {}
    for level in range(len(state["projection.level_embed"])):
        for part in (0, 1):
            pairs[f"projection.input_proj.{level}.{part}"] = f"input_proj.{level}.{part}"
    if two_stage:
        for part in ("enc_output", "enc_output_norm", "pos_trans", "pos_trans_norm"):
            pairs[f"transformer.queries.{part}"] = f"transformer.{part}"
    else:
        result["query_embed.weight"] = state["transformer.queries.query_embed.weight"]
        pairs["transformer.queries.reference_points"] = "transformer.reference_points"
    for index in range(encoder):
        layer = f"transformer.encoder.layers.{index}"
        for part in DEFORMABLE:
            pairs[f"{layer}.self_attn.{part}"] = f"{layer}.self_attn.{part}"
        pairs[f"{layer}.norm1"] = f"{layer}.norm1"
        pairs[f"{layer}.ffn.linear1"] = f"{layer}.linear1"
        pairs[f"{layer}.ffn.linear2"] = f"{layer}.linear2"
        pairs[f"{layer}.ffn.norm"] = f"{layer}.norm2"
    for index in range(decoder):
        layer = f"transformer.decoder.layers.{index}"
        for part in DEFORMABLE:
            pairs[f"{layer}.cross_attn.{part}"] = f"{layer}.cross_attn.{part}"
        for part in ("in_proj_weight", "in_proj_bias"):
            result[f"{layer}.self_attn.{part}"] = state[f"{layer}.self_attn.{part}"]
        pairs[f"{layer}.self_attn.out_proj"] = f"{layer}.self_attn.out_proj"
        pairs[f"{layer}.norm1"] = f"{layer}.norm1"
        pairs[f"{layer}.norm2"] = f"{layer}.norm2"
        pairs[f"{layer}.ffn.linear1"] = f"{layer}.linear1"
        pairs[f"{layer}.ffn.linear2"] = f"{layer}.linear2"
        pairs[f"{layer}.ffn.norm"] = f"{layer}.norm3"
    result |= {theirs: state[ours] for ours, theirs in _modules(pairs)}
    return result | _heads(state, decoder, two_stage, refined)


def as_detrex(state: State, encoder: int, decoder: int, features: int) -> State:
    """The same as detrex would save it; ``features`` levels come from the backbone."""
    two_stage = "transformer.queries.pos_trans.weight" in state
    refined = "transformer.decoder.heads.1.class_embed.bias" in state
    result = {
        name: tensor
        for name, tensor in state.items()
        if name.startswith("backbone.") and not name.endswith("num_batches_tracked")
    }
    result["transformer.level_embeds"] = state["projection.level_embed"]
    pairs = {}
    for level in range(len(state["projection.level_embed"])):
        convs = f"convs.{level}" if level < features else f"extra_convs.{level - features}"
        pairs[f"projection.input_proj.{level}.0"] = f"neck.{convs}.conv"
        pairs[f"projection.input_proj.{level}.1"] = f"neck.{convs}.norm"
    if two_stage:
        for part in ("enc_output", "enc_output_norm", "pos_trans", "pos_trans_norm"):
            pairs[f"transformer.queries.{part}"] = f"transformer.{part}"
    else:
        result["query_embedding.weight"] = state["transformer.queries.query_embed.weight"]
        pairs["transformer.queries.reference_points"] = "transformer.reference_points"
    for index in range(encoder):
        layer = f"transformer.encoder.layers.{index}"
        for part in DEFORMABLE:
            pairs[f"{layer}.self_attn.{part}"] = f"{layer}.attentions.0.{part}"
        pairs[f"{layer}.norm1"] = f"{layer}.norms.0"
        pairs[f"{layer}.ffn.linear1"] = f"{layer}.ffns.0.layers.0.0"
        pairs[f"{layer}.ffn.linear2"] = f"{layer}.ffns.0.layers.1"
        pairs[f"{layer}.ffn.norm"] = f"{layer}.norms.1"
    for index in range(decoder):
        layer = f"transformer.decoder.layers.{index}"
        for part in DEFORMABLE:
            pairs[f"{layer}.cross_attn.{part}"] = f"{layer}.attentions.1.{part}"
        for part in ("in_proj_weight", "in_proj_bias"):
            result[f"{layer}.attentions.0.attn.{part}"] = state[f"{layer}.self_attn.{part}"]
        pairs[f"{layer}.self_attn.out_proj"] = f"{layer}.attentions.0.attn.out_proj"
        # There the norms are numbered in the order in which they are applied.
        pairs[f"{layer}.norm2"] = f"{layer}.norms.0"
        pairs[f"{layer}.norm1"] = f"{layer}.norms.1"
        pairs[f"{layer}.ffn.linear1"] = f"{layer}.ffns.0.layers.0.0"
        pairs[f"{layer}.ffn.linear2"] = f"{layer}.ffns.0.layers.1"
        pairs[f"{layer}.ffn.norm"] = f"{layer}.norms.2"
    result |= {theirs: state[ours] for ours, theirs in _modules(pairs)}
    return result | _heads(state, decoder, two_stage, refined)


def as_caffe2(backbone: State) -> State:
    """A ResNet of Detectron2 as the files of its oldest backbones have it."""
    result = {}
    for name, tensor in backbone.items():
        parts = name.split(".")
        norm = {"weight": "bn_s", "bias": "bn_b"}.get(parts[-1]) if "norm" in parts else "w"
        if norm is None:  # the running statistics are merged into scale and shift
            continue
        if parts[0] == "stem":
            result["conv1_w" if norm == "w" else f"res_conv1_{norm}"] = tensor
            continue
        branch = "branch1" if parts[2] == "shortcut" else f"branch2{'abc'[int(parts[2][-1]) - 1]}"
        result[f"{parts[0]}_{parts[1]}_{branch}_{norm}"] = tensor
    return result


def as_reference_detr(state: State, encoder: int, decoder: int) -> State:
    """The state of a DETR of this project as the reference implementation of DETR would save it."""
    result = {}
    for name, tensor in state.items():
        if name.startswith("backbone.") and not name.endswith("num_batches_tracked"):
            result[f"backbone.0.body.{_torchvision(name.removeprefix('backbone.'))}"] = tensor
    result["query_embed.weight"] = state["transformer.queries.query_embed.weight"]
    head = "transformer.decoder.heads.0"
    pairs = {
        "projection.input_proj.0.0": "input_proj",
        "transformer.decoder.norm": "transformer.decoder.norm",
        f"{head}.class_embed": "class_embed",
    }
    for linear in range(3):
        pairs[f"{head}.bbox_embed.{3 * linear}"] = f"bbox_embed.layers.{linear}"
    # Norms here and there, in the order in which they are applied.
    layers = [("encoder", i, {"norm1": "norm1", "ffn.norm": "norm2"}) for i in range(encoder)]
    norms = {"norm2": "norm1", "norm1": "norm2", "ffn.norm": "norm3"}
    layers += [("decoder", i, norms) for i in range(decoder)]
    for kind, index, norms in layers:
        layer = f"transformer.{kind}.layers.{index}"
        for ours, theirs in norms.items():
            pairs[f"{layer}.{ours}"] = f"{layer}.{theirs}"
        for linear in ("linear1", "linear2"):
            pairs[f"{layer}.ffn.{linear}"] = f"{layer}.{linear}"
        attentions = {"self_attn": "self_attn"}
        if kind == "decoder":
            attentions["cross_attn"] = "multihead_attn"
        for ours, theirs in attentions.items():
            pairs[f"{layer}.{ours}.out_proj"] = f"{layer}.{theirs}.out_proj"
            for part in ("in_proj_weight", "in_proj_bias"):
                result[f"{layer}.{theirs}.{part}"] = state[f"{layer}.{ours}.{part}"]
    return result | {theirs: state[ours] for ours, theirs in _modules(pairs)}


def as_mmdetection(state: State, encoder: int, decoder: int, features: int, major: int) -> State:
    """The same as mmdetection of the given major version, 2 or 3, would save it. Its projections
    have no bias."""
    two_stage = "transformer.queries.pos_trans.weight" in state
    refined = "transformer.decoder.heads.1.class_embed.bias" in state
    result = {}
    for name, tensor in state.items():
        if name.startswith("backbone."):
            result[f"backbone.{_torchvision(name.removeprefix('backbone.'))}"] = tensor
    # Version 2: where the transformer is, what the query embedding is called, and the parts of it.
    within = "bbox_head.transformer." if major == 2 else ""
    level_embed = "level_embeds" if major == 2 else "level_embed"
    result[within + level_embed] = state["projection.level_embed"]
    pairs = {}
    for level in range(len(state["projection.level_embed"])):
        convs = f"convs.{level}" if level < features else f"extra_convs.{level - features}"
        own = f"projection.input_proj.{level}"
        result[f"neck.{convs}.conv.weight"] = state[f"{own}.0.weight"]
        pairs[f"{own}.1"] = f"neck.{convs}.gn"
    parts = {
        "enc_output": "memory_trans_fc",
        "enc_output_norm": "memory_trans_norm",
        "pos_trans": "pos_trans_fc",
        "pos_trans_norm": "pos_trans_norm",
        "reference_points": "reference_points_fc",
    }
    for own, theirs in parts.items():
        if f"transformer.queries.{own}.weight" in state:
            pairs[f"transformer.queries.{own}"] = within + (own if major == 2 else theirs)
    if not two_stage:
        query = "bbox_head.query_embedding" if major == 2 else "query_embedding"
        result[f"{query}.weight"] = state["transformer.queries.query_embed.weight"]
    self_attn, cross_attn, ffn = (
        ("attentions.0", "attentions.1", "ffns.0")
        if major == 2
        else ("self_attn", "cross_attn", "ffn")
    )
    for index in range(encoder):
        layer, there = f"transformer.encoder.layers.{index}", f"{within}encoder.layers.{index}"
        for part in DEFORMABLE:
            pairs[f"{layer}.self_attn.{part}"] = f"{there}.{self_attn}.{part}"
        pairs[f"{layer}.norm1"] = f"{there}.norms.0"
        pairs[f"{layer}.ffn.linear1"] = f"{there}.{ffn}.layers.0.0"
        pairs[f"{layer}.ffn.linear2"] = f"{there}.{ffn}.layers.1"
        pairs[f"{layer}.ffn.norm"] = f"{there}.norms.1"
    for index in range(decoder):
        layer, there = f"transformer.decoder.layers.{index}", f"{within}decoder.layers.{index}"
        for part in DEFORMABLE:
            pairs[f"{layer}.cross_attn.{part}"] = f"{there}.{cross_attn}.{part}"
        for part in ("in_proj_weight", "in_proj_bias"):
            result[f"{there}.{self_attn}.attn.{part}"] = state[f"{layer}.self_attn.{part}"]
        pairs[f"{layer}.self_attn.out_proj"] = f"{there}.{self_attn}.attn.out_proj"
        pairs[f"{layer}.norm2"] = f"{there}.norms.0"
        pairs[f"{layer}.norm1"] = f"{there}.norms.1"
        pairs[f"{layer}.ffn.linear1"] = f"{there}.{ffn}.layers.0.0"
        pairs[f"{layer}.ffn.linear2"] = f"{there}.{ffn}.layers.1"
        pairs[f"{layer}.ffn.norm"] = f"{there}.norms.2"
    for index in range(decoder + two_stage):
        own = f"transformer.decoder.heads.{index if refined else 0}"
        if index == decoder:
            own = "transformer.queries.head"
        pairs_of_head = {f"{own}.class_embed": f"bbox_head.cls_branches.{index}"}
        for linear in range(3):
            theirs = f"bbox_head.reg_branches.{index}.{2 * linear}"
            pairs_of_head[f"{own}.bbox_embed.{3 * linear}"] = theirs
        result |= {theirs: state[ours] for ours, theirs in _modules(pairs_of_head)}
    result |= {theirs: state[ours] for ours, theirs in _modules(pairs)}
    return result
