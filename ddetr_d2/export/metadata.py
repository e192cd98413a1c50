"""What an exported file says of itself, so that it can be used without its configuration."""

from typing import Any

from detectron2.config import CfgNode

from .detector import ExportableDetector


def describe(
    detector: ExportableDetector, cfg: CfgNode, class_names: list[str] | None
) -> dict[str, Any]:
    """Everything a program needs to feed the exported detector and to read its output.

    Args:
        detector: what is exported.
        cfg: configuration of the model.
        class_names: names of the classes; numbers take their place where they are not known.

    Returns:
        values that JSON can hold, by the names that docs/export.md lists.
    """
    node = cfg.MODEL.DEFORMABLE_DETR
    number = node.NUM_CLASSES
    return {
        "class_names": class_names or [str(index) for index in range(number)],
        "input_names": detector.input_names,
        "output_names": detector.output_names,
        "preprocess": detector.preprocess,
        "postprocess": detector.postprocess,
        "activation": {"focal": "sigmoid", "cross_entropy": "softmax"}[node.CLASS_LOSS],
        "layout": "NCHW",
        "channel_order": cfg.INPUT.FORMAT,
        "value_range": [0, 255],
        "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
        "pixel_std": list(cfg.MODEL.PIXEL_STD),
        "shortest_side": cfg.INPUT.MIN_SIZE_TEST,
        "longest_side": cfg.INPUT.MAX_SIZE_TEST,
        "resize_rule": cfg.INPUT.RESIZE_RULE,
        "size_divisor": max(detector.model.backbone.size_divisibility, 1),
    }
