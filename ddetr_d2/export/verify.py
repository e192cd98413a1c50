"""Running exported files, and comparing them with the model they were made from."""

import functools
import json
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..errors import UserError
from .detector import ExportableDetector
from .formats import METADATA_FILE, require_package


def load_onnx(path: str, extension: str = "") -> tuple[Callable[..., list[Tensor]], dict[str, Any]]:
    """An ONNX file as a function of tensors, run by onnxruntime on the CPU, and its metadata.

    Args:
        path: an ONNX file.
        extension: a library that :mod:`.onnxruntime_extension` built, for files that need it.

    Raises:
        UserError: the package onnxruntime is missing, or the library is no extension for it.
    """
    require_package("onnxruntime", "running an ONNX file")
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    if extension:
        try:
            options.register_custom_ops_library(os.path.abspath(extension))
        except Fail as error:
            raise UserError(
                f"{extension} is no extension of onnxruntime; python -m "
                f"ddetr_d2.export.onnxruntime_extension builds one ({error})"
            ) from error
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        feed = {name: tensor.cpu().numpy() for name, tensor in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, feed)]

    metadata = session.get_modelmeta().custom_metadata_map
    return run, {key: json.loads(value) for key, value in metadata.items()}


def load_onnx_in_openvino(
    path: str, extension: str = "", precision: str = "f32"
) -> tuple[Callable[..., list[Tensor]], dict[str, Any]]:
    """As :func:`load_onnx`, run by OpenVINO.

    Args:
        path: an ONNX file.
        extension: a library that :mod:`.openvino_extension` built, for files that need it.
        precision: what convolutions and matrix products are computed in, ``f32`` or ``bf16``.

    Raises:
        UserError: the package openvino is missing, or the library is no extension for its version.
    """
    require_package("openvino", "running an ONNX file in OpenVINO")
    core = _openvino_core(os.path.abspath(extension) if extension else "")
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = core.read_model(path)
    compiled = core.compile_model(model, "CPU", settings)

    def run(*inputs: Tensor) -> list[Tensor]:
        outputs = compiled([tensor.cpu().numpy() for tensor in inputs])
        return [torch.from_numpy(output) for output in outputs.values()]

    metadata = model.get_rt_info("framework").astype(dict) if model.has_rt_info("framework") else {}
    return run, {key: json.loads(value.astype(str)) for key, value in metadata.items()}


@functools.cache
def _openvino_core(extension: str) -> Any:
    """OpenVINO itself, with an extension if a path is given; kept until the process ends.

    Each sets an alternative stack for signal handlers and puts back, when it goes, the one that it
    found: if that was of another one, gone before, the next signal ends the process.

    Raises:
        UserError: the library is no extension for this version of OpenVINO.
    """
    import openvino

    core = openvino.Core()
    if extension:
        try:
            core.add_extension(extension)
        except RuntimeError as error:
            raise UserError(
                f"{extension} is no extension for this version of OpenVINO; build it anew with "
                f"python -m ddetr_d2.export.openvino_extension ({str(error).splitlines()[-1]})"
            ) from error
    return core


def load_torchscript(path: str) -> tuple[Callable[..., list[Tensor]], dict[str, Any]]:
    """A TorchScript file and its metadata."""
    files = {METADATA_FILE: ""}
    module = torch.jit.load(path, _extra_files=files)
    return module, json.loads(files[METADATA_FILE])


def load_torch_export(path: str) -> tuple[Callable[..., list[Tensor]], dict[str, Any]]:
    """A file of torch.export as a module, and its metadata."""
    files = {METADATA_FILE: ""}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        program = torch.export.load(path, extra_files=files)
    return program.module(), json.loads(files[METADATA_FILE])


LOADERS: dict[str, Callable[[str], tuple[Callable[..., list[Tensor]], dict[str, Any]]]] = {
    "onnx": load_onnx,
    "torchscript": load_torchscript,
    "torch_export": load_torch_export,
}


class Differences(NamedTuple):
    """Largest differences between two sets of detections.

    Attributes:
        scores: of scores, 0 to 1.
        boxes: of box coordinates, as fractions of the image's longer side.
    """

    scores: float
    boxes: float


def compare(
    detector: ExportableDetector, run: Callable[..., list[Tensor]], inputs: tuple[Tensor, ...]
) -> Differences:
    """Compare an exported file with the model itself, on the same inputs.

    Every detection of the file is compared with one of the model of its own, the nearest one:
    the order of nearly equal scores does not matter. A detection whose class differs, or that the
    model does not make at all, shows as a large difference.

    Args:
        detector: what was exported, with ``sampling`` "operator".
        run: the exported file, see :data:`LOADERS`.
        inputs: inputs of both.
    """
    with torch.no_grad():
        outputs = run(*inputs)
        images, sizes_or_mask, *output_sizes = inputs
        if detector.preprocess:
            images, sizes_or_mask = detector.prepare(images, sizes_or_mask)
        predictions = detector.model.predict(images, sizes_or_mask)[0][-1]
    # Of all queries and classes, so that none is missing that the file may have preferred.
    logits = predictions.logits.double()
    candidates = detector.model.criterion.matcher.classification.best(logits, logits[0].numel())
    differences = []
    for index in range(len(images)):
        # What is no number is far from everything.
        actual = [np.nan_to_num(tensor[index].cpu().numpy(), nan=1e6) for tensor in outputs]
        if detector.postprocess:
            size = output_sizes[0][index].cpu().numpy()
            boxes = predictions.boxes[index].double()
            chosen = [tensor[index].cpu().numpy() for tensor in candidates]
            count = detector.model.num_detections
            differences.append(
                _compare_detections(chosen, boxes.cpu().numpy(), actual, size, count)
            )
        else:
            expected = [tensor[index].double().cpu().numpy() for tensor in predictions]
            differences.append(_compare_queries(expected, actual))
    return Differences(*np.max(differences, axis=0).tolist())


def _compare_queries(expected: list[np.ndarray], actual: list[np.ndarray]) -> Differences:
    scores = [1 / (1 + np.exp(-logits.astype(np.float64))) for logits, _ in (expected, actual)]
    if len(scores[0]) != len(scores[1]):
        return Differences(np.inf, np.inf)
    by_score = np.abs(scores[0][:, None] - scores[1]).max(-1)
    by_box = np.abs(expected[1][:, None] - actual[1]).max(-1)
    return _of_pairs(by_score, by_box)


def _compare_detections(
    candidates: list[np.ndarray],
    boxes: np.ndarray,
    actual: list[np.ndarray],
    size: np.ndarray,
    count: int,
) -> Differences:
    """``candidates``: scores, labels and queries of all possible detections, the best first, of
    which ``count`` are kept; ``boxes`` (Q, 4) of all queries; ``actual``: scores, labels, boxes."""
    height, width = size
    scores, labels, queries = candidates
    center, extent = boxes[:, :2], boxes[:, 2:]
    corners = np.concatenate((center - extent / 2, center + extent / 2), axis=1)
    corners = (corners * [width, height, width, height])[queries]

    best = scores[:count]
    if len(best) != len(actual[0]):
        return Differences(np.inf, np.inf)
    by_rank = np.abs(best - actual[0]).max()
    # Far below the lowest score, no candidate can be a detection.
    likely = scores > best[-1] - 0.01
    by_score = np.abs(actual[0][:, None] - scores[likely])
    by_score[actual[1][:, None] != labels[likely]] = 1.0
    by_box = np.abs(actual[2][:, None] - corners[likely]).max(-1) / max(height, width)
    matched = _of_pairs(by_score, by_box)
    return Differences(max(by_rank, matched.scores), matched.boxes)


def _of_pairs(by_score: np.ndarray, by_box: np.ndarray) -> Differences:
    """Largest differences after each row got a column of its own, at the lowest sum of both."""
    rows, columns = linear_sum_assignment(by_score + by_box)
    return Differences(by_score[rows, columns].max(), by_box[rows, columns].max())
