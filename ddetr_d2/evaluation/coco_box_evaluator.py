"""COCO's box AP as a Detectron2 evaluator."""

import itertools
import json
import logging
import math
import os
import tempfile
from collections import ChainMap, Counter, OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from tabulate import tabulate

from ..errors import UserError
from .box_precision import box_precision

RESULTS_FILE = "coco_instances_results.json"
Id = int | str

logger = logging.getLogger(__name__)


class CocoBoxEvaluator(DatasetEvaluator):
    """Box AP of a data set in memory: figures, keys and tables of Detectron2's COCOEvaluator.

    Beyond it: the ground truth may have text for ids, the model may have other classes than the
    data set, and more (or fewer) than 100 detections per image can be allowed.
    """

    def __init__(
        self,
        name: str,
        ground_truth: dict[str, Any],
        category_ids: Sequence[Id | None],
        *,
        max_detections: int = 100,
        output_dir: str | None = None,
    ) -> None:
        """
        Args:
            name: name of the data set, for messages.
            ground_truth: COCO instances, which are not modified: ``images``, ``categories`` and
                ``annotations`` (``bbox`` as x, y, width and height in pixels, ``area``,
                ``iscrowd``). Ids are whole numbers or text. Without the key ``annotations``
                detections are written and nothing is evaluated.
            category_ids: category of each class of the model; None where the data set has no such
                class, whose detections are dropped. Other categories of the data set do not count.
            max_detections: the most confident detections of an image that count (as COCO counts
                them: of an image and category).
            output_dir: folder for ``coco_instances_results.json``, with the ids of
                ``ground_truth``; None to write nothing.
        """
        self._name = name
        self._ground_truth = ground_truth
        self._category_ids = category_ids
        self._evaluated = [*dict.fromkeys(c for c in category_ids if c is not None)]
        self._max_detections = max_detections
        self._output_dir = output_dir
        self.reset()

    def reset(self) -> None:
        self._detections: dict[Id, list[dict[str, Any]]] = {}  # COCO results of each image

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Take the detections of a batch.

        Args:
            inputs: dicts with ``image_id``.
            outputs: dicts with ``instances``, which have ``pred_boxes``, ``scores`` and
                ``pred_classes``.
        """
        for image, output in zip(inputs, outputs, strict=True):
            results = instances_to_coco_json(output["instances"].to("cpu"), image["image_id"])
            for result in results:
                result["category_id"] = self._category_ids[result["category_id"]]
            self._detections[image["image_id"]] = [
                result for result in results if result["category_id"] is not None
            ]

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Gather the detections of all processes, write and evaluate them.

        Returns:
            ``{"bbox": figures}`` in percent, in the main process only: AP, AP50, AP75, APs, APm,
            APl, and with several categories AP-<name> of each. NaN where there is nothing to find,
            or no detection at all. Empty without annotations and in other processes.

        Raises:
            UserError: if the results cannot be written.
        """
        comm.synchronize()
        gathered = comm.gather(self._detections, dst=0)
        if not comm.is_main_process():
            return {}
        # A sampler may give one image to several processes; ChainMap takes it from the first.
        detections = [*itertools.chain(*ChainMap(*gathered).values())]
        detections = self._drop_non_finite(detections)
        if self._output_dir is not None:
            _write_results(self._output_dir, detections)
        if "annotations" not in self._ground_truth:
            logger.info(f"{self._name} has no annotations: nothing is evaluated.")
            return OrderedDict()
        return OrderedDict(bbox=self._average_precisions(detections))

    def _drop_non_finite(self, detections: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Numbers that are not finite have no order, and JSON has no words for them."""
        finite = [d for d in detections if all(map(math.isfinite, (d["score"], *d["bbox"])))]
        if dropped := len(detections) - len(finite):
            logger.warning(
                f"{dropped:,} of {len(detections):,} detections in {self._name} have scores or "
                "boxes that are NaN or infinite; they are left out. Did the training diverge?"
            )
        return finite

    def _numbered(self, detections: list[dict[str, Any]]) -> tuple[dict[str, Any], np.ndarray]:
        """Ground truth and detections for :func:`box_precision`, with whole numbers for ids.

        Images keep the order of their ids, which decides between detections of equal scores.
        """
        image_ids = (image["id"] for image in self._ground_truth["images"])
        ordered = sorted(image_ids, key=lambda image_id: (isinstance(image_id, str), image_id))
        images = {image_id: n for n, image_id in enumerate(ordered, 1)}
        categories = {category_id: n for n, category_id in enumerate(self._evaluated, 1)}
        annotations = [
            {
                "id": n,
                "image_id": images[annotation["image_id"]],
                "category_id": categories[annotation["category_id"]],
                **{key: annotation[key] for key in ("bbox", "area", "iscrowd")},
            }
            for n, annotation in enumerate(self._ground_truth["annotations"], 1)
            if annotation["category_id"] in categories
        ]
        ground_truth = {
            "images": [{"id": n} for n in images.values()],
            "categories": [{"id": n, "name": str(n)} for n in categories.values()],
            "annotations": annotations,
        }
        rows = [
            (images[d["image_id"]], *d["bbox"], d["score"], categories[d["category_id"]])
            for d in detections
        ]
        return ground_truth, np.array(rows)

    def _average_precisions(self, detections: list[dict[str, Any]]) -> dict[str, float]:
        ground_truth, rows = self._numbered(detections)
        self._warn_of_limit(ground_truth["annotations"])
        if not detections:
            logger.warning(f"The model has no detections in {self._name}: AP is NaN.")
            return dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), math.nan)

        precision = box_precision(ground_truth, rows, self._max_detections)
        averages = {
            "AP": _mean_percent(precision[..., 0]),
            "AP50": _mean_percent(precision[0, ..., 0]),
            "AP75": _mean_percent(precision[5, ..., 0]),
            "APs": _mean_percent(precision[..., 1]),
            "APm": _mean_percent(precision[..., 2]),
            "APl": _mean_percent(precision[..., 3]),
        }
        logger.info("Evaluation results for bbox: \n" + create_small_table(averages))
        if any(map(math.isnan, averages.values())):
            logger.info("NaN: there are no objects of that size.")
        if len(self._evaluated) <= 1:
            return averages
        names = {c["id"]: c["name"] for c in self._ground_truth["categories"]}
        of_categories = [
            (str(names[category_id]), _mean_percent(precision[:, :, k, 0]))
            for k, category_id in enumerate(self._evaluated)
        ]
        logger.info("Per-category bbox AP: \n" + _table(of_categories))
        return averages | {f"AP-{name}": ap for name, ap in of_categories}

    def _warn_of_limit(self, annotations: list[dict[str, Any]]) -> None:
        objects = Counter(a["image_id"] for a in annotations if not a["iscrowd"])
        beyond = [count for count in objects.values() if count > self._max_detections]
        if beyond:
            logger.warning(
                f"{len(beyond):,} of {len(self._ground_truth['images']):,} images of {self._name} "
                f"have more than {self._max_detections} objects (up to {max(beyond):,}), which no "
                "model can find with that many detections; raise TEST.DETECTIONS_PER_IMAGE."
            )


def _mean_percent(precision: np.ndarray) -> float:
    known = precision[precision > -1]
    return float(np.mean(known) * 100) if known.size else math.nan


def _table(of_categories: list[tuple[str, float]]) -> str:
    """Names and AP, three pairs a line as in Detectron2."""
    rows = [
        [*itertools.chain(*of_categories[start : start + 3])]
        for start in range(0, len(of_categories), 3)
    ]
    return tabulate(
        rows,
        headers=["category", "AP"] * (len(rows[0]) // 2),
        tablefmt="pipe",
        floatfmt=".3f",
        numalign="left",
    )


def _write_results(folder: str, detections: list[dict[str, Any]]) -> None:
    path = os.path.join(folder, RESULTS_FILE)
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".results_", dir=folder) as work:
            whole = os.path.join(work, RESULTS_FILE)
            with open(whole, "w") as file:
                file.write(json.dumps(detections))
            os.replace(whole, path)
    except OSError as error:
        raise UserError(f"cannot write the detections to {path}: {error.strerror}.") from error
