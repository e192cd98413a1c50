"""A :class:`~ddetr_d2.detector.Detector` for SAHI, which detects on large images in tiles."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from detectron2.structures import Instances
from PIL import Image
from sahi.models.base import DetectionModel
from sahi.prediction import ObjectPrediction
from sahi.utils.compatibility import fix_full_shape_list, fix_shift_amount_list

from ..detector import Detector


class DetrDetectionModel(DetectionModel):
    """What SAHI's functions take as ``detection_model``.

    SAHI's own model for Detectron2 gives images as RGB to Detectron2's predictor, which expects
    BGR: detectors trained on RGB images, as those of this project, then see red as blue.

    ::

        model = DetrDetectionModel(Detector("output/model_final.pth"), confidence_threshold=0.5)
        result = get_sliced_prediction("large.jpg", model, slice_height=512, slice_width=512)
    """

    category_mapping: dict[str, str] | None

    def __init__(self, detector: Detector, confidence_threshold: float = 0.3, **options: Any):
        """
        Args:
            detector: on whichever device it is.
            confidence_threshold: lowest score of detections, 0 to 1.
            options: of SAHI's ``DetectionModel``, such as ``category_remapping``.
        """
        device = str(detector.model.device)
        super().__init__(
            model=detector, device=device, confidence_threshold=confidence_threshold, **options
        )

    def set_model(self, model: Detector, **_: Any) -> None:
        """Take a detector, and the names of its classes unless they were given."""
        self.model = model
        if self.category_mapping is None:
            number = model.cfg.MODEL.DEFORMABLE_DETR.NUM_CLASSES
            names = model.class_names or map(str, range(number))
            self.category_mapping = {str(index): name for index, name in enumerate(names)}

    def perform_inference(self, image: np.ndarray) -> None:
        """Detect on an image (H, W, 3) or (H, W), uint8 RGB or grey."""
        self.perform_batch_inference([image])

    def perform_batch_inference(self, images: Sequence[np.ndarray]) -> None:
        """Detect on images of :meth:`perform_inference`, together."""
        # Pillow's images are RGB, whatever order of channels the detector expects of arrays.
        pictures = [Image.fromarray(image) for image in images]
        self._original_predictions = self.model(pictures, batch_size=len(pictures))

    def _create_object_prediction_list_from_original_predictions(
        self,
        shift_amount_list: list | None = None,
        full_shape_list: list | None = None,
    ) -> None:
        """Put the detections of tiles where they are in the whole image.

        Args:
            shift_amount_list: x and y of each tile's corner.
            full_shape_list: height and width of the whole image, for each tile.
        """
        results = self._original_predictions
        shifts = fix_shift_amount_list(shift_amount_list)
        shapes = fix_full_shape_list(full_shape_list) or [None] * len(results)
        self._object_prediction_list_per_image = [
            self._object_predictions(instances, shift, shape)
            for instances, shift, shape in zip(results, shifts, shapes, strict=True)
        ]

    def _object_predictions(
        self, instances: Instances, shift: list, shape: list | None
    ) -> list[ObjectPrediction]:
        instances.pred_boxes.clip(instances.image_size)
        chosen = (instances.scores >= self.confidence_threshold) & instances.pred_boxes.nonempty()
        instances = instances[chosen]
        names = self.category_mapping or {}
        return [
            ObjectPrediction(
                bbox=box,
                category_id=category,
                category_name=names[str(category)],
                score=score,
                shift_amount=shift,
                full_shape=shape,
            )
            for box, category, score in zip(
                instances.pred_boxes.tensor.tolist(),
                instances.pred_classes.tolist(),
                instances.scores.tolist(),
                strict=True,
            )
        ]
