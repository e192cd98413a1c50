#!/usr/bin/env python
"""Draw the detections of an exported ONNX file by onnxruntime or OpenVINO, numpy and OpenCV alone.

::

    python demo/onnx_demo.py model.onnx photo.jpg drawing.jpg --confidence-threshold 0.5
"""

import argparse
import json
import os
from collections.abc import Callable

import cv2
import numpy as np

# The inputs of the model, by name, to its outputs in their order.
Model = Callable[[dict[str, np.ndarray]], list[np.ndarray]]


def load_in_onnxruntime(path: str, extension: str) -> tuple[Model, dict[str, str]]:
    """The model, and its metadata as JSON.

    Args:
        path: an ONNX file.
        extension: a library with the operator of --sampling extension; empty for none.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if extension:
        options.register_custom_ops_library(os.path.abspath(extension))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    return lambda inputs: session.run(None, inputs), metadata


def load_in_openvino(path: str, extension: str, precision: str) -> tuple[Model, dict[str, str]]:
    """The model, and its metadata as JSON.

    Args:
        path: an ONNX file.
        extension: a library with the operator of --sampling extension; empty for none.
        precision: f32 or bf16.
    """
    import openvino

    core = openvino.Core()
    if extension:
        core.add_extension(os.path.abspath(extension))
    model = core.read_model(path)
    settings = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    compiled = core.compile_model(model, "CPU", settings)
    known = model.get_rt_info("framework").astype(dict) if model.has_rt_info("framework") else {}
    metadata = {key: value.astype(str) for key, value in known.items()}
    return lambda inputs: list(compiled(inputs).values()), metadata


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
    parser.add_argument("--runtime", choices=("onnxruntime", "openvino"), default="onnxruntime")
    parser.add_argument(
        "--precision", choices=("f32", "bf16"), default="f32", help="OpenVINO only: 32 or 16 bits"
    )
    parser.add_argument(
        "--extension",
        default="",
        metavar="FILE",
        help="library for this runtime that a file of --sampling extension needs, see "
        "docs/export.md",
    )
    args = parser.parse_args()
    for path in filter(None, (args.model, args.image, args.extension)):
        if not os.path.isfile(path):
            parser.error(f"{path} does not exist")
    if args.runtime != "openvino" and args.precision != "f32":
        parser.error("--precision is for --runtime openvino")

    try:
        if args.runtime == "openvino":
            run, metadata = load_in_openvino(args.model, args.extension, args.precision)
        else:
            run, metadata = load_in_onnxruntime(args.model, args.extension)
    except ImportError:
        parser.error(f"--runtime {args.runtime}: pip install {args.runtime}")
    except Exception as error:  # each runtime has kinds of its own
        files = " with ".join(filter(None, (args.model, args.extension)))
        parser.error(f"{args.runtime} cannot run {files}: {error}")
    rules = {key: json.loads(value) for key, value in metadata.items()}
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
    scores, labels, boxes = (output[0] for output in run(inputs))

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
