"""Test-time augmentation: detections on resized and mirrored copies of an image, merged."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import DatasetMapperTTA
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou

from ..errors import UserError

MERGES = ("nms", "soft_nms")


class SetDetectorWithTTA(nn.Module):
    """A detector with test-time augmentation, called as the detector itself.

    It is to the models of this project what Detectron2's GeneralizedRCNNWithTTA is to R-CNNs. Each
    image is resized to every size of ``TEST.AUG.MIN_SIZES`` (at most ``TEST.AUG.MAX_SIZE`` on the
    longer side), and with ``TEST.AUG.FLIP`` mirrored as well. What the detector finds on all of
    these is merged by ``TEST.AUG.MERGE``, and the ``TEST.DETECTIONS_PER_IMAGE`` best are kept.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        tta_mapper: Callable[[dict], list[dict]] | None = None,
        batch_size: int = 2,
    ):
        """
        Args:
            cfg: the configuration.
            model: a :class:`~ddetr_d2.modeling.SetDetector`, prepared for inference or not.
            tta_mapper: makes the augmented inputs of one; Detectron2's ``DatasetMapperTTA`` of
                ``cfg`` by default.
            batch_size: augmented images that the model gets at a time, all of one size: an image
                and its mirror image by default.

        Raises:
            UserError: a key of TEST.AUG has a value that does not work.
        """
        super().__init__()
        self._merge = _merge(cfg)
        self.model = model
        self.tta_mapper = tta_mapper or DatasetMapperTTA(cfg)
        self.batch_size = batch_size
        self.train(model.training)  # else Detectron2 would leave a model training that was not

    @torch.no_grad()
    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """
        Args:
            batched_inputs: one dict per image as the detector takes it: ``image`` (3, H, W) uint8,
                best of the original size, since it is resized here (:func:`keep_original_size`);
                ``height`` and ``width`` of the wanted output, those of ``image`` by default.

        Returns:
            ``[{"instances": Instances}]`` with ``pred_boxes`` in pixels of the output, ``scores``
            and ``pred_classes``, the best first.
        """
        return [{"instances": self._detect(inputs)} for inputs in batched_inputs]

    def _detect(self, inputs: dict) -> Instances:
        image = inputs["image"].cpu()
        size = inputs.get("height", image.shape[1]), inputs.get("width", image.shape[2])
        augmented = self.tta_mapper({"image": image, "height": size[0], "width": size[1]})
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        for batch in _batches(augmented, self.batch_size):
            # Without the size of an output, boxes are in pixels of the augmented image.
            outputs = self.model([{"image": x["image"]} for x in batch])
            for x, output in zip(batch, outputs, strict=True):
                instances = output["instances"].to("cpu")
                boxes = instances.pred_boxes.tensor.float().numpy()
                boxes = torch.from_numpy(x["transforms"].inverse().apply_box(boxes))
                found.append((boxes, instances.scores.float(), instances.pred_classes))
        boxes, scores, classes = (torch.cat(parts) for parts in zip(*found, strict=True))
        kept, scores = self._merge(boxes, scores, classes)
        result = Instances(size)
        result.pred_boxes = Boxes(boxes[kept])
        result.scores = scores
        result.pred_classes = classes[kept]
        return result.to(self.model.device)


def keep_original_size(cfg: CfgNode) -> CfgNode:
    """A copy of ``cfg`` in which test images are not resized, for :class:`SetDetectorWithTTA`."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.INPUT.MIN_SIZE_TEST = 0
    cfg.freeze()
    return cfg


def check(cfg: CfgNode) -> None:
    """Refuse values under TEST.AUG that do not work.

    Raises:
        UserError: there is such a value.
    """
    aug = cfg.TEST.AUG
    if not aug.MIN_SIZES or not all(type(size) is int and size > 0 for size in aug.MIN_SIZES):
        raise UserError(
            f"TEST.AUG.MIN_SIZES is {aug.MIN_SIZES!r}; give one or more lengths of the shorter "
            "side in pixels, such as (640, 800)."
        )
    if aug.MAX_SIZE < 1:
        raise UserError(f"TEST.AUG.MAX_SIZE is {aug.MAX_SIZE}; give a number of pixels above 0.")
    if aug.MERGE not in MERGES:
        raise UserError(f"TEST.AUG.MERGE is {aug.MERGE!r}; expected one of {', '.join(MERGES)}.")
    if not 0 <= aug.NMS_THRESH <= 1:
        raise UserError(f"TEST.AUG.NMS_THRESH is {aug.NMS_THRESH}; give an IoU of 0 to 1.")
    if not aug.SOFT_NMS_SIGMA > 0:
        raise UserError(f"TEST.AUG.SOFT_NMS_SIGMA is {aug.SOFT_NMS_SIGMA}; give more than 0.")


def nms(
    boxes: Tensor, scores: Tensor, classes: Tensor, *, threshold: float, count: int
) -> tuple[Tensor, Tensor]:
    """Drop detections that overlap with a better one of their class.

    Args:
        boxes: (N, 4) corners x1, y1, x2, y2 in pixels.
        scores: (N,)
        classes: (N,)
        threshold: highest IoU that is left alone.
        count: most detections to keep.

    Returns:
        indices (M,) of the detections that are kept, the best first, and their scores (M,).
    """
    # Classes are told apart by moving their boxes, which takes them to begin at 0.
    kept = batched_nms(boxes - boxes.min(), scores, classes, threshold)[:count]
    return kept, scores[kept]


def soft_nms(
    boxes: Tensor, scores: Tensor, classes: Tensor, *, sigma: float, count: int
) -> tuple[Tensor, Tensor]:
    """Lower the scores of detections that overlap with a better one of their class.

    Soft-NMS (Bodla et al. 2017, arXiv 1704.04503) with the Gaussian penalty: of the detections
    left, the best one is taken again and again, and scores of the others are multiplied by
    exp(-IoU² / sigma).

    Args:
        boxes: (N, 4) corners x1, y1, x2, y2 in pixels.
        scores: (N,)
        classes: (N,)
        sigma: the smaller, the lower the scores become.
        count: most detections to keep.

    Returns:
        as :func:`nms`, with the lowered scores.
    """
    left = torch.ones_like(scores, dtype=torch.bool)
    kept = []
    for _ in range(min(count, len(scores))):
        best = scores.masked_fill(~left, -torch.inf).argmax()
        left[best] = False
        kept.append(best)
        overlap = box_iou(boxes[best][None], boxes)[0]
        lowered = scores * torch.exp(-(overlap**2) / sigma)
        scores = torch.where(left & (classes == classes[best]), lowered, scores)
    indices = torch.stack(kept)
    return indices, scores[indices]


def _merge(cfg: CfgNode) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What TEST.AUG.MERGE names, as a function of boxes, scores and classes."""
    check(cfg)
    aug, count = cfg.TEST.AUG, cfg.TEST.DETECTIONS_PER_IMAGE
    if aug.MERGE == "nms":
        return functools.partial(nms, threshold=aug.NMS_THRESH, count=count)
    return functools.partial(soft_nms, sigma=aug.SOFT_NMS_SIGMA, count=count)


def _batches(inputs: Iterable[dict[str, Any]], batch_size: int) -> Iterator[list[dict[str, Any]]]:
    """Batches of successive images of one size, so that none is padded."""
    for _, group in itertools.groupby(inputs, lambda x: x["image"].shape):
        same = list(group)
        for first in range(0, len(same), batch_size):
            yield same[first : first + batch_size]
