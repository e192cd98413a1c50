"""What is done to an image before the model sees it: flips, crops, and how it is resized."""

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from fvcore.transforms.transform import NoOpTransform

from ..errors import UserError

_FLIPS = ("horizontal", "vertical", "none")
# Arithmetic of lengths after a resize (INPUT.RESIZE_RULE), see :func:`resized_shape`.
RESIZE_RULES = ("detr", "detectron2")
# The resize before a crop enlarges without a limit for the longest side; this one, times the
# shortest side, is met by strips only and keeps them from filling the memory.
_MAX_ASPECT_RATIO = 10


def resized_shape(
    height: int, width: int, shortest: int, longest: int, rule: str
) -> tuple[int, int]:
    """Height and width of an image after its resize to a shortest side, with a limit for the other.

    ``"detr"`` computes them as DETR and the reference implementation do: the other side is
    truncated, and where it would exceed the limit, the shortest is first lowered and rounded, so
    that the longest may exceed the limit after all. 480 x 640 becomes 800 x 1066, and 200 x 640
    becomes 417 x 1334 with the limit 1333. ``"detectron2"`` scales both sides by one factor and
    rounds them: 800 x 1067 and 417 x 1333.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        shortest: length wanted for the shorter side.
        longest: limit for the longer side.
        rule: one of :data:`RESIZE_RULES`.

    Returns:
        at least one pixel a side.
    """
    short, long = min(height, width), max(height, width)
    if rule == "detr":
        size = shortest
        if long / short * size > longest:
            size = round(longest * short / long)
        # The reference fails on strips that would become less than one pixel wide.
        lengths = (size, int(size * long / short)) if size else (1, longest)
        return lengths if height <= width else lengths[::-1]
    shape = T.ResizeShortestEdge.get_output_shape(height, width, shortest, longest)
    return max(shape[0], 1), max(shape[1], 1)


class ResizeShortestEdge(T.ResizeShortestEdge):
    """Detectron2's, with the lengths of :func:`resized_shape`."""

    def __init__(
        self,
        short_edge_length: int | tuple[int, ...],
        max_size: int,
        sample_style: str,
        rule: str,
    ) -> None:
        """
        Args:
            short_edge_length: lengths for the shortest side, in pixels.
            max_size: limit for the longest side, in pixels.
            sample_style: "choice" of one of the lengths, or "range" between two.
            rule: one of :data:`RESIZE_RULES`.
        """
        super().__init__(short_edge_length, max_size, sample_style)
        self.rule = rule

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """The resize of ``image`` (H, W, ...) to a size that is drawn at random."""
        height, width = image.shape[:2]
        if self.is_range:
            low, high = self.short_edge_length
            shortest = np.random.randint(low, high + 1)
        else:
            shortest = np.random.choice(self.short_edge_length)
        if shortest == 0:  # as in Detectron2, no resize
            return NoOpTransform()
        shape = resized_shape(height, width, int(shortest), self.max_size, self.rule)
        return T.ResizeTransform(height, width, *shape, self.interp)


def build_augmentation(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The augmentation of the paper's recipe (section 4.1 of DETR), of Detectron2's transforms.

    In training: a flip (``INPUT.RANDOM_FLIP``), half the time a random crop (``INPUT.CROP``, if
    enabled) of the image resized to one of ``INPUT.CROP.MIN_SIZE_TRAIN``, and a resize to one of
    ``INPUT.MIN_SIZE_TRAIN``, at most ``INPUT.MAX_SIZE_TRAIN``. In testing: the resize to
    ``INPUT.MIN_SIZE_TEST``, at most ``INPUT.MAX_SIZE_TEST``. Every resize follows
    ``INPUT.RESIZE_RULE``.

    Raises:
        UserError: ``INPUT.RANDOM_FLIP`` or ``INPUT.RESIZE_RULE`` is unknown.
    """
    flip, rule = cfg.INPUT.RANDOM_FLIP, cfg.INPUT.RESIZE_RULE
    for key, value, known in (("RANDOM_FLIP", flip, _FLIPS), ("RESIZE_RULE", rule, RESIZE_RULES)):
        if value not in known:
            raise UserError(f"INPUT.{key} is {value!r}: one of {', '.join(known)} is expected")
    if not is_train:
        return [
            ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, "choice", rule)
        ]
    augmentations: list[T.Augmentation] = []
    if flip != "none":
        augmentations.append(
            T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")
        )
    if cfg.INPUT.CROP.ENABLED:
        sizes = cfg.INPUT.CROP.MIN_SIZE_TRAIN
        crop = T.AugmentationList(
            [
                ResizeShortestEdge(sizes, _MAX_ASPECT_RATIO * max(sizes), "choice", rule),
                T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE),
            ]
        )
        augmentations.append(T.RandomApply(crop, prob=0.5))
    augmentations.append(
        ResizeShortestEdge(
            cfg.INPUT.MIN_SIZE_TRAIN,
            cfg.INPUT.MAX_SIZE_TRAIN,
            cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING,
            rule,
        )
    )
    return augmentations
