"""Configuration of Hugging Face transformers, ``config.json`` and ``preprocessor_config.json``."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode

from ..errors import UserError
from ..modeling.backbone import STAGES

DEPTHS = {
    18: [2, 2, 2, 2],
    34: [3, 4, 6, 3],
    50: [3, 4, 6, 3],
    101: [3, 4, 23, 3],
    152: [3, 8, 36, 3],
}
# timm's names by depth, groups and width of a group.
_TIMM_NAMES = {
    (50, 1, 64): "resnet50",
    (101, 1, 64): "resnet101",
    (152, 1, 64): "resnet152",
    (50, 32, 4): "resnext50_32x4d",
    (101, 32, 4): "resnext101_32x4d",
    (101, 32, 8): "resnext101_32x8d",
    (101, 64, 4): "resnext101_64x4d",
}
# Limit of the inverse sigmoid there, and the entry of config.json that tells another one: only this
# project reads it.
_THEIR_EPS = 1e-5
_EPS = "inverse_sigmoid_eps"


def transformers_config(cfg: CfgNode, class_names: Sequence[str] | None = None) -> dict[str, Any]:
    """``config.json`` of transformers for the model that ``cfg`` builds.

    Raises:
        UserError: if transformers has no such model.
    """
    node = cfg.MODEL.DEFORMABLE_DETR
    names = class_names or [f"LABEL_{number}" for number in range(node.NUM_CLASSES)]
    return {
        **(_detr(cfg) if cfg.MODEL.META_ARCHITECTURE == "DETR" else _deformable_detr(cfg)),
        "activation_function": "relu",
        "activation_dropout": node.DROPOUT,
        "attention_dropout": node.DROPOUT,
        "dropout": node.DROPOUT,
        **_backbone_config(cfg),
        "bbox_cost": _whole(node.L1_WEIGHT),
        "bbox_loss_coefficient": _whole(node.L1_WEIGHT),
        "class_cost": _whole(node.CLASS_WEIGHT),
        "d_model": node.HIDDEN_DIM,
        "decoder_attention_heads": node.NUM_HEADS,
        "decoder_ffn_dim": node.DIM_FEEDFORWARD,
        "decoder_layers": node.DEC_LAYERS,
        "encoder_attention_heads": node.NUM_HEADS,
        "encoder_ffn_dim": node.DIM_FEEDFORWARD,
        "encoder_layers": node.ENC_LAYERS,
        "giou_cost": _whole(node.GIOU_WEIGHT),
        "giou_loss_coefficient": _whole(node.GIOU_WEIGHT),
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
        "num_queries": node.NUM_QUERIES,
        "position_embedding_type": "sine",
    }


def _detr(cfg: CfgNode) -> dict[str, Any]:
    """What only DETR has."""
    node = cfg.MODEL.DEFORMABLE_DETR
    if node.CLASS_LOSS != "cross_entropy":
        raise UserError(
            "transformers has DETR with a softmax over the classes and 'no object' only "
            f"(MODEL.DEFORMABLE_DETR.CLASS_LOSS is {node.CLASS_LOSS})."
        )
    return {
        "architectures": ["DetrForObjectDetection"],
        "model_type": "detr",
        # With it, version 5 normalises what one decoder layer hands to the next: another model.
        "auxiliary_loss": False,
        "eos_coefficient": float(node.NO_OBJECT_WEIGHT),
    }


def _deformable_detr(cfg: CfgNode) -> dict[str, Any]:
    """What only Deformable DETR has."""
    node = cfg.MODEL.DEFORMABLE_DETR
    if node.TWO_STAGE and not node.WITH_BOX_REFINE:
        raise UserError("transformers has two-stage models with box refinement only.")
    if node.CLASS_LOSS != "focal":
        raise UserError(
            "transformers has Deformable DETR with a sigmoid for each class only "
            f"(MODEL.DEFORMABLE_DETR.CLASS_LOSS is {node.CLASS_LOSS})."
        )
    if not node.MULTI_SCALE_ATTENTION and node.NUM_FEATURE_LEVELS > 1:
        raise UserError(
            "transformers has Deformable DETR with multi-scale attention only "
            "(MODEL.DEFORMABLE_DETR.MULTI_SCALE_ATTENTION is False)."
        )
    other_eps = {}
    if node.INVERSE_SIGMOID_EPS != _THEIR_EPS:
        logging.getLogger(__name__).warning(
            f"MODEL.DEFORMABLE_DETR.INVERSE_SIGMOID_EPS is {node.INVERSE_SIGMOID_EPS}, but "
            f"transformers always computes with {_THEIR_EPS}: boxes near the border of the image "
            "will differ there."
        )
        other_eps = {_EPS: node.INVERSE_SIGMOID_EPS}
    return {
        "architectures": ["DeformableDetrForObjectDetection"],
        "model_type": "deformable_detr",
        "auxiliary_loss": True,
        **other_eps,
        "decoder_n_points": node.DEC_POINTS,
        "encoder_n_points": node.ENC_POINTS,
        "focal_alpha": node.FOCAL_ALPHA,
        "num_feature_levels": node.NUM_FEATURE_LEVELS,
        "two_stage": node.TWO_STAGE,
        "two_stage_num_proposals": node.NUM_QUERIES,
        "with_box_refine": node.WITH_BOX_REFINE,
    }


def preprocessor_config(cfg: CfgNode) -> dict[str, Any]:
    """``preprocessor_config.json`` of transformers with the image size and the normalisation."""
    detr = cfg.MODEL.META_ARCHITECTURE == "DETR"
    channels = slice(None, None, -1 if cfg.INPUT.FORMAT == "BGR" else 1)
    return {
        "image_processor_type": "DetrImageProcessor" if detr else "DeformableDetrImageProcessor",
        "format": "coco_detection",
        "do_resize": True,
        "size": {"shortest_edge": cfg.INPUT.MIN_SIZE_TEST, "longest_edge": cfg.INPUT.MAX_SIZE_TEST},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [value / 255 for value in cfg.MODEL.PIXEL_MEAN[channels]],
        "image_std": [value / 255 for value in cfg.MODEL.PIXEL_STD[channels]],
        "do_pad": True,
    }


def options_of(config: Mapping[str, Any], needed: str) -> dict[str, Any]:
    """What ``config.json`` tells of a model beyond its weights, as configuration keys and values.

    Args:
        config: its content.
        needed: model type of the weights, "detr" or "deformable_detr".

    Raises:
        UserError: if it is the configuration of another model, or of a kind that is not had here.
    """
    kind = config.get("model_type")
    if kind != needed:
        raise UserError(f"config.json is of a {kind!r} model; a {needed!r} is needed.")
    for key, value in (("position_embedding_type", "sine"), ("activation_function", "relu")):
        if config.get(key, value) != value:
            raise UserError(f"config.json has {key} {config[key]!r}; only {value!r} is supported.")
    backbone = config.get("backbone_config") or {}
    dilated = config.get("dilation") or backbone.get("output_stride") == 16
    node = "MODEL.DEFORMABLE_DETR."
    options = {
        f"{node}NUM_HEADS": config.get("encoder_attention_heads", 8),
        f"{node}DROPOUT": float(config.get("dropout", 0.1)),
        "MODEL.RESNETS.RES5_DILATION": 2 if dilated else 1,
        "MODEL.RESNETS.STRIDE_IN_1X1": backbone.get("downsample_in_bottleneck", False),
    }
    if needed == "detr":
        return options | {
            f"{node}NUM_QUERIES": config.get("num_queries", 100),
            f"{node}NO_OBJECT_WEIGHT": float(config.get("eos_coefficient", 0.1)),
        }
    two_stage = config.get("two_stage", False)
    queries = "two_stage_num_proposals" if two_stage else "num_queries"
    return options | {
        f"{node}NUM_QUERIES": config.get(queries, 300),
        f"{node}ENC_POINTS": config.get("encoder_n_points", 4),
        f"{node}DEC_POINTS": config.get("decoder_n_points", 4),
        f"{node}INVERSE_SIGMOID_EPS": config.get(_EPS, _THEIR_EPS),
    }


def class_names_of(config: Mapping[str, Any]) -> list[str] | None:
    """The labels in ``config.json``; None if they are but numbered."""
    labels = config.get("id2label") or {}
    names = [str(labels[key]) for key in sorted(labels, key=int)]
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in names) else names


def _backbone_config(cfg: CfgNode) -> dict[str, Any]:
    """The backbone: the ResNet of transformers where that can be it, else one of timm."""
    resnet, features = cfg.MODEL.RESNETS, cfg.MODEL.DEFORMABLE_DETR.IN_FEATURES
    slim = cfg.MODEL.BACKBONE.NAME == "build_slim_resnet_backbone"
    unknown = UserError(
        f"transformers has no backbone like this one (MODEL.BACKBONE.NAME "
        f"{cfg.MODEL.BACKBONE.NAME}, MODEL.RESNETS.DEPTH {resnet.DEPTH})."
    )
    if not slim and cfg.MODEL.BACKBONE.NAME != "build_resnet_backbone":
        raise unknown
    basic = slim or resnet.DEPTH < 50
    stages = 1 + max(STAGES.index(name) for name in resnet.OUT_FEATURES)
    groups, width = resnet.NUM_GROUPS, resnet.WIDTH_PER_GROUP
    plain = groups == 1 and resnet.RES5_DILATION == 1
    if basic or (plain and 4 * width == resnet.RES2_OUT_CHANNELS and not _is_deformable(cfg)):
        return {
            "use_timm_backbone": False,
            "backbone": None,
            "use_pretrained_backbone": False,
            "dilation": False,
            "backbone_config": {
                "model_type": "resnet",
                "layer_type": "basic" if basic else "bottleneck",
                "embedding_size": resnet.STEM_OUT_CHANNELS,
                "hidden_sizes": [resnet.RES2_OUT_CHANNELS * 2**stage for stage in range(stages)],
                "depths": ([2, 2, 2, 2] if slim else DEPTHS[resnet.DEPTH])[:stages],
                "downsample_in_bottleneck": resnet.STRIDE_IN_1X1 and not basic,
                "out_features": [f"stage{STAGES.index(name) + 1}" for name in features],
            },
        }
    name = _TIMM_NAMES.get((resnet.DEPTH, groups, width))
    usual = resnet.STEM_OUT_CHANNELS == 64 and resnet.RES2_OUT_CHANNELS == 256
    levels = cfg.MODEL.DEFORMABLE_DETR.NUM_FEATURE_LEVELS
    wanted = list(STAGES[1:] if levels > 1 else STAGES[3:])
    if not name or not usual or features != wanted or _is_deformable(cfg) or resnet.STRIDE_IN_1X1:
        raise unknown
    return {
        "use_timm_backbone": True,
        "backbone": name,
        "use_pretrained_backbone": False,
        "dilation": resnet.RES5_DILATION == 2,
    }


def _is_deformable(cfg: CfgNode) -> bool:
    return any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE)


def _whole(value: float) -> float:
    """An int where it is one: newer versions of transformers insist."""
    return int(value) if float(value).is_integer() else value
