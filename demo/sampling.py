"""From where the detector is shown to look: from the best detections and from chosen pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

from ddetr_d2.data import read_image
from ddetr_d2.errors import UserError
from ddetr_d2.visualization import AttentionRecorder, SamplingPanel, check_pixel

from detectron2.data.catalog import Metadata
from detectron2.structures import Instances
from detectron2.utils.visualizer import _create_text_labels
from tqdm import tqdm


@dataclass(frozen=True)
class SamplingRequest:
    """What to draw of where the detector looks.

    Attributes:
        detections: from so many detections, the best first.
        pixels: and from the encoder's tokens at these pixels (x, y).
        files: a file for the picture of each image; None to show them.
    """

    detections: int
    pixels: Sequence[tuple[int, int]]
    files: Sequence[str] | None

    def panels(
        self, recorder: AttentionRecorder, instances: Instances, metadata: Metadata
    ) -> list[SamplingPanel]:
        """The panels of one image's picture.

        A query that is detected with several classes is shown once, with the best of them.
        """
        names = metadata.get("thing_classes")
        labels = _create_text_labels(instances.pred_classes.tolist(), instances.scores, names)
        best: dict[int, int] = {}  # query to detection
        for index, query in enumerate(instances.queries.tolist()):
            best.setdefault(query, index)
        panels = []
        for query, index in list(best.items())[: self.detections]:
            points = recorder.from_query(query, instances.image_size)
            box = tuple(instances.pred_boxes.tensor[index].tolist())
            panels.append(SamplingPanel(f"decoder: {labels[index]}", points, box))
        for x, y in self.pixels:
            points = recorder.from_pixel((x, y), instances.image_size)
            panels.append(SamplingPanel(f"encoder: pixel {x},{y}", points, points.cell))
        return panels


def parse_pixels(texts: Sequence[str], images: Sequence[str]) -> list[tuple[int, int]]:
    """Pixels from texts such as ``120,85``, which have to lie in all of the images.

    Images that cannot be read are left to the detection to report.

    Raises:
        UserError: if a text is no pixel, or lies outside of an image.
    """
    pixels = []
    for text in texts:
        try:
            x, y = map(int, text.split(","))
        except ValueError:
            raise UserError(
                f"--sampling-pixels {text} is no pixel; give column and row as X,Y, as in 120,85."
            ) from None
        pixels.append((x, y))
    for path in tqdm(images if pixels else [], "checking sizes", disable=len(images) == 1):
        try:
            size = read_image(path).shape[:2]
        except UserError:
            continue
        for pixel in pixels:
            try:
                check_pixel(pixel, size)
            except UserError as error:
                raise UserError(f"--sampling-pixels, {path}: {error}") from None
    return pixels
