"""Draws docs/images/tiles.jpg: detections on a large image as it is, and in tiles by SAHI.

::

    make demo
    python docs/images/tiles.py
"""

import itertools
import json
from pathlib import Path

from ddetr_d2 import Detector
from ddetr_d2.integrations.sahi import DetrDetectionModel

import numpy as np
import supervision as sv
from PIL import Image
from sahi.predict import get_sliced_prediction

RUN = Path("output/quickstart")
COLUMNS, ROWS, WIDTH, HEIGHT = 4, 3, 217, 213
THRESHOLD = 0.4

annotations = json.loads((RUN / "data" / "val.json").read_text())
records = annotations["images"][: COLUMNS * ROWS]
large = Image.new("RGB", (COLUMNS * WIDTH, ROWS * HEIGHT))
places = itertools.product(range(0, large.height, HEIGHT), range(0, large.width, WIDTH))
for record, (y, x) in zip(records, places, strict=True):
    image = Image.open(RUN / "data" / "val" / record["file_name"])
    large.paste(image.resize((WIDTH, HEIGHT)), (x, y))

detector = Detector(RUN / "model_final.pth")
instances = detector(large)
whole = sv.Detections.from_detectron2({"instances": instances[instances.scores >= THRESHOLD]})
model = DetrDetectionModel(detector, confidence_threshold=THRESHOLD)
result = get_sliced_prediction(
    large,
    model,
    slice_height=HEIGHT,
    slice_width=WIDTH,
    postprocess_type="NMS",
    postprocess_match_metric="IOU",
)
found = result.object_prediction_list
tiled = sv.Detections(
    np.array([prediction.bbox.to_xyxy() for prediction in found]),
    class_id=np.array([prediction.category.id for prediction in found]),
)

ids = {record["id"] for record in records}
objects = sum(annotation["image_id"] in ids for annotation in annotations["annotations"])
print(f"{objects} objects; {len(whole)} detections on the whole image, {len(tiled)} in tiles")
annotator = sv.BoxAnnotator(color=sv.Color.WHITE, thickness=3)
pictures = [annotator.annotate(np.array(large), detections) for detections in (whole, tiled)]
gap = np.full((large.height, 12, 3), 255, np.uint8)
picture = Image.fromarray(np.hstack([pictures[0], gap, pictures[1]]))
picture.thumbnail((1200, 600))
picture.save(Path(__file__).with_suffix(".jpg"), quality=85)
