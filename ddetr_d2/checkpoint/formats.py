"""Recognise whose weights a file holds, by their names, and give them the names of this project."""

import argparse
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor

from ..errors import UserError
from ..modeling.set_detector import CLASS_LOSSES
from .architecture import (
    CLASS_LOSS,
    DILATION,
    INVERSE_SIGMOID_EPS,
    MULTI_SCALE_ATTENTION,
    NUM_HEADS,
    UNTOLD,
    class_outputs,
    num_classes,
    usual_class_loss,
)
from .files import local_path, read_file
from .names import (
    DETREX,
    MMDETECTION,
    MMDETECTION_2,
    REFERENCE,
    REFERENCE_DETR,
    TORCHVISION_RESNET,
    State,
    is_detr,
    prefixed,
    rename,
    reverse,
    split_heads,
    without_counters,
)
from .timm_weights import PREFIX as TIMM
from .timm_weights import from_timm
from .transformers import from_transformers, is_their_detr
from .transformers_config import class_names_of, options_of

_THINGS = [category for category in COCO_CATEGORIES if category["isthing"]]
COCO_NAMES = [category["name"] for category in _THINGS]
COCO_IDS = [category["id"] for category in _THINGS]
# Classes of models that count COCO's by category id: 0 to 90, eleven of them unused.
NUM_COCO_IDS = 1 + max(COCO_IDS)

# Entries that are no weights of ours: classifiers of backbones, counters of training and profiling.
_IGNORED = re.compile(
    r"(?:.*\.)?(?:fc|fc1000|linear_head|total_ops|total_params)(?:\..+)?|pred_[wb]"
)


@dataclass
class Weights:
    """Weights under this project's names, and what else their file tells.

    Attributes:
        format: whose they were, in words.
        model: a state of a :class:`ddetr_d2.modeling.SetDetector`, or of its backbone alone.
        class_names: name of each class, where the file tells or implies them.
        options: configuration keys and values that cannot be told from the weights.
        coco_ids: the class outputs are counted by COCO category id; see :func:`to_contiguous`.
        rest: further entries of a checkpoint of this project.
    """

    format: str
    model: State
    class_names: list[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    coco_ids: bool = False
    rest: dict[str, Any] = field(default_factory=dict)

    @property
    def is_backbone(self) -> bool:
        """Whether there is nothing but a backbone."""
        return all(name.startswith("backbone.") for name in self.model)


def read_weights(path: str, allow_pickle: bool = False, shown: str = "") -> Weights:
    """Read weights of any known format.

    Args:
        path: a file, a URL, a folder of Hugging Face transformers, a name on the hub
            (:mod:`.hub`), or weights of a model of timm (:mod:`.timm_weights`).
        allow_pickle: see :func:`ddetr_d2.checkpoint.files.read_file`.
        shown: what to call the file in messages; ``path`` by default.

    Raises:
        UserError: if there is no such file, or it is damaged, unsafe or of no known format.
    """
    shown = shown or path
    path = local_path(path)
    content = read_file(path, allow_pickle, shown)
    if shown.startswith(TIMM):
        return Weights("timm", from_timm(_tensors(content), shown))
    state = _state(content)
    if not state:
        raise UserError(
            f"{shown} holds no weights; name a checkpoint (.pth), a folder of transformers, or a "
            "backbone (.pkl, .pth, .safetensors)."
        )
    for pattern, convert in _FORMATS:
        if any(pattern.match(name) for name in state):
            return convert(state, content, path)
    names = ", ".join(list(state)[:3])
    raise UserError(
        f"{shown} holds weights of an unknown model ({names}, ...); known are DETR and "
        "Deformable DETR of the reference implementations and of transformers, Deformable DETR of "
        "detrex and of mmdetection, and ResNets. Those of a model of timm are given as "
        f"{TIMM}NAME/FILE."
    )


def _state(content: Any) -> State:
    """The weights of a file, without classifiers of backbones."""
    tensors = _tensors(content)
    return {name: tensor for name, tensor in tensors.items() if not _IGNORED.fullmatch(name)}


def _tensors(content: Any) -> State:
    """The tensors of a file, wherever in it they are."""
    if not isinstance(content, Mapping):
        return {}
    for key in ("model", "model_state", "state_dict", "blobs"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
            break
    state = {}
    for name, value in content.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            value = torch.from_numpy(np.array(value))
        if isinstance(value, Tensor) and isinstance(name, str):
            state[name] = value
    # What torch.compile and DistributedDataParallel put before names.
    state = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
    if state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _own(state: State, content: Any, path: str) -> Weights:
    if "model" not in content:
        return Weights("ddetr_d2", state)
    rest = {key: value for key, value in content.items() if key != "model"}
    names, options = _told(content)
    if names and CLASS_LOSS not in options:  # checkpoints older than this entry
        has_no_object = class_outputs(state) == len(names) + 1
        options[CLASS_LOSS] = "cross_entropy" if has_no_object else "focal"
    return Weights("ddetr_d2", state, names, options, rest=rest)


def _told(content: Any) -> tuple[list[str] | None, dict[str, Any]]:
    """Class names and options that this project has written beside the weights."""
    names, options = content.get("class_names"), content.get("options")
    options = options if isinstance(options, dict) else {}
    known = {key: options[key] for key in UNTOLD if isinstance(options.get(key), int | float)}
    if options.get(CLASS_LOSS) in CLASS_LOSSES:
        known[CLASS_LOSS] = options[CLASS_LOSS]
    return [str(name) for name in names] if isinstance(names, list) else None, known


def _reference(state: State, content: Any, path: str) -> Weights:
    state = without_counters(state)
    if any(".multihead_attn." in name for name in state):
        converted = rename(state, reverse(REFERENCE_DETR))
    else:
        converted = split_heads(rename(state, reverse(REFERENCE)))
    names, options = _told(content)
    args = content.get("args")
    args = vars(args) if isinstance(args, argparse.Namespace) else args
    args = args if isinstance(args, dict) else {}
    node = "MODEL.DEFORMABLE_DETR."
    keys = {
        "nheads": NUM_HEADS,
        "num_queries": f"{node}NUM_QUERIES",
        "enc_n_points": f"{node}ENC_POINTS",
        "dec_n_points": f"{node}DEC_POINTS",
        "dropout": f"{node}DROPOUT",
    }
    if not is_detr(converted):
        options = {INVERSE_SIGMOID_EPS: 1e-5} | options
    options |= {
        key: args[name] for name, key in keys.items() if isinstance(args.get(name), int | float)
    }
    if "dilation" in args:
        options[DILATION] = 2 if args["dilation"] else 1
    return _with_classes(Weights("reference implementation", converted, names, options))


def _with_one_list_of_levels(state: State) -> State:
    """``state`` with ``neck.extra_convs`` counted on from ``neck.convs``."""
    first_extra = len({name.split(".")[2] for name in state if name.startswith("neck.convs.")})
    return {
        re.sub(
            r"^neck\.extra_convs\.(\d+)", lambda m: f"neck.convs.{first_extra + int(m[1])}", name
        ): tensor
        for name, tensor in state.items()
    }


def _mapping(content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The mapping within another one; empty where there is none."""
    value = content.get(key)
    return value if isinstance(value, Mapping) else {}


def _mmdetection(state: State, content: Any, path: str) -> Weights:
    state = _with_one_list_of_levels(rename(without_counters(state), MMDETECTION_2))
    state = {
        name.replace("backbone.", "backbone.0.body.", 1)
        if name.startswith("backbone.")
        else name: x
        for name, x in rename(state, reverse(MMDETECTION)).items()
    }
    for name, weight in [*state.items()]:
        if re.fullmatch(r"input_proj\.\d+\.0\.weight", name):  # they have no bias
            state.setdefault(name.replace("weight", "bias"), weight.new_zeros(len(weight)))
    state = split_heads(rename(state, reverse(REFERENCE)))
    meta = _mapping(content, "meta")
    data_set = _mapping(meta, "dataset_meta")
    names = data_set.get("classes") or data_set.get("CLASSES") or meta.get("CLASSES")
    names = [str(name) for name in names] if isinstance(names, list | tuple) else None
    return _with_classes(Weights("mmdetection", state, names, {INVERSE_SIGMOID_EPS: 1e-5}))


def _detrex(state: State, content: Any, path: str) -> Weights:
    state = _with_one_list_of_levels(without_counters(state))
    state = split_heads(rename(state, reverse(DETREX)))
    # Trained with another limit than the reference implementation's, which moves boxes.
    return _with_classes(Weights("detrex", state, options={INVERSE_SIGMOID_EPS: 1e-3}))


def _transformers(state: State, content: Any, path: str) -> Weights:
    weights = Weights("transformers", from_transformers(state))
    config_file = os.path.join(os.path.dirname(path), "config.json")
    if os.path.isfile(config_file):
        try:
            with open(config_file) as file:
                config = json.load(file)
            kind = "detr" if is_their_detr(state) else "deformable_detr"
            weights.options, weights.class_names = options_of(config, kind), class_names_of(config)
        except UserError as error:
            raise UserError(f"{config_file}: {error}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{config_file} is no configuration of transformers.") from error
    return _with_classes(weights)


def _resnet(state: State, content: Any, path: str) -> Weights:
    state = rename(without_counters(state), prefixed(reverse(TORCHVISION_RESNET), "", "backbone."))
    known = {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}
    return Weights("ResNet of torchvision or timm", known)


def _detectron2(state: State, content: Any, path: str) -> Weights:
    state = without_counters(state)
    if any(name.startswith("backbone.") for name in state):  # a detector's
        state = {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}
    start = re.compile(r"^(backbone\.)?(bottom_up\.)?")
    return Weights("Detectron2 backbone", {start.sub("backbone.", k): v for k, v in state.items()})


def _caffe2(state: State, content: Any, path: str) -> Weights:
    state = {k: v for k, v in state.items() if not k.endswith("_momentum")}
    converted, _ = convert_c2_detectron_names(state)
    # The running statistics of these backbones are merged into scale and shift.
    for name, tensor in list(converted.items()):
        if name.endswith(".norm.weight"):
            start = name.removesuffix("weight")
            converted.setdefault(f"{start}running_mean", torch.zeros_like(tensor))
            converted.setdefault(f"{start}running_var", torch.ones_like(tensor))
    return Weights("Caffe2 backbone", {f"backbone.{k}": v for k, v in converted.items()})


# By names that no other format has, most telling first.
_FORMATS = [
    (re.compile(pattern), convert)
    for pattern, convert in (
        (r"projection\.|transformer\.(queries|decoder\.heads)\.", _own),
        (r"model\.(encoder|decoder)\.layers\.\d+\.\w+\.sampling_offsets\.", _transformers),
        (r"class_labels_classifier\.|model\.input_projection\.", _transformers),
        (r"bbox_head\.", _mmdetection),
        (r"neck\.convs\.|transformer\.\w+\.layers\.\d+\.attentions\.", _detrex),
        (r"backbone\.0\.body\.|transformer\.\w+\.layers\.\d+\.\w+\.sampling_offs", _reference),
        (r"transformer\.decoder\.layers\.\d+\.multihead_attn\.", _reference),
        (r"layer\d\.\d+\.conv1\.", _resnet),
        (r"(backbone|stem|res[2-5]\.\d+)\.", _detectron2),
        (r"(conv1|res\d_\d+_branch2a)_w", _caffe2),
    )
]


def _with_classes(weights: Weights) -> Weights:
    """Add how classes are told apart, and COCO's classes by their number, or by the names where
    there are any."""
    if weights.is_backbone:
        return weights
    # Others have but one kind of each member.
    usual: dict[str, Any] = {CLASS_LOSS: usual_class_loss(weights.model)}
    if not is_detr(weights.model):
        usual[MULTI_SCALE_ATTENTION] = True
    weights.options = usual | weights.options
    classes = num_classes(weights.model, weights.options)
    names = weights.class_names
    if names and len(names) != classes:
        names = None
    if classes == NUM_COCO_IDS and (not names or [names[i] for i in COCO_IDS] == COCO_NAMES):
        weights.coco_ids, names = True, COCO_NAMES
    elif classes == len(COCO_NAMES) and not names:
        names = COCO_NAMES
    weights.class_names = names
    return weights


def to_contiguous(weights: Weights) -> Weights:
    """Reduce class outputs counted by COCO category id to the 80 classes of Detectron2.

    The output for "no object", if there is one, stays the last.
    """
    model = dict(weights.model)
    outputs = COCO_IDS + list(range(NUM_COCO_IDS, class_outputs(model)))
    for name, tensor in weights.model.items():
        if re.match(r"transformer\.decoder\.heads\.\d+\.class_embed\.", name):
            model[name] = tensor[outputs]
        elif name.startswith("transformer.queries.head.class_embed."):
            # Output 0 of the proposals says "object" whatever the class: it has to stay first.
            model[name] = tensor[: len(COCO_IDS)]
    return replace(weights, model=model, class_names=COCO_NAMES, coco_ids=False)
