#!/usr/bin/env python
"""Draw the detections of an exported ONNX file, with onnxruntime, numpy and OpenCV alone.

::

    python demo/onnx_demo.py model.onnx photo.jpg drawing.jpg --confidence-threshold 0.5
"""

import argparse
import json
import os

import cv2
import numpy as np
import onnxruntime


def resized_shape(height: int, width: int, rules: dict) -> tuple[int, int]:
    """Height and width that the model was trained to see an image of this size in.

    ``rules`` is the file's metadata; docs/export.md explains ``resize_rule``.
    """
    shortest, longest = rules["shortest_side"], rules["longest_side"]
    short, long = min(height, width), max(height, width)
    if rules.get("resize_rule") == "detr":
        if long / short * shortest > longest:
            shortest = round(longest * short / long)
        lengths = (shortest, int(shortest * long / short)) if shortest else (1, longest)
        return lengths if height <= width else lengths[::-1]
    scale = shortest / short
    if scale * long > longest:
        scale = scale * (longest / (scale * long))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    for name in ("model", "image", "drawing"):
        parser.add_argument(name)
    parser.add_argument("--confidence-threshold", type=float, default=0.5)
    args = parser.parse_args()
    for path in (args.model, args.image):
        if not os.path.isfile(path):
            parser.error(f"{path} does not exist")

    session = onnxruntime.InferenceSession(args.model, providers=["CPUExecutionProvider"])
    rules = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    if not (rules.get("preprocess") and rules.get("postprocess")):
        parser.error(f"{args.model} does not take pixels and give boxes: see docs/export.md")
    picture = cv2.imread(args.image)
    if picture is None:
        parser.error(f"{args.image} cannot be read as an image")

    height, width = picture.shape[:2]
    new_height, new_width = resized_shape(height, width, rules)
    shrinks = new_height < height or new_width < width
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    image = cv2.resize(picture, (new_width, new_height), interpolation=interpolation)
    if rules["channel_order"] == "RGB":
        image = image[:, :, ::-1]
    inputs = {
        "images": np.ascontiguousarray(image.transpose(2, 0, 1))[None],
        "image_sizes": np.array([image.shape[:2]], np.int64),
        "output_sizes": np.array([[height, width]], np.int64),
    }
    scores, labels, boxes = (output[0] for output in session.run(None, inputs))

    color = (0, 200, 0)
    for index in np.flatnonzero(scores >= args.confidence_threshold):
        x0, y0, x1, y1 = boxes[index].round().astype(int).tolist()
        text = f"{rules['class_names'][labels[index]]} {scores[index]:.0%}"
        cv2.rectangle(picture, (x0, y0), (x1, y1), color, 2)
        corner = max(x0, 0), max(y0 - 4, 12)
        cv2.putText(picture, text, corner, cv2.FONT_HERSHEY_SIMPLEX, 0.5, color, 1, cv2.LINE_AA)
        print(f"{text}: {x0}, {y0}, {x1}, {y1}")
    if not cv2.imwrite(args.drawing, picture):
        parser.error(f"{args.drawing} cannot be written")


if __name__ == "__main__":
    main()
