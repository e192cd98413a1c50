"""COCO's box AP of any data set in memory."""

from .coco_box_evaluator import CocoBoxEvaluator

__all__ = ["CocoBoxEvaluator"]
