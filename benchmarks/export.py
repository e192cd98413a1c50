"""A detector in its exported forms on the CPU, beside the model itself."""

import os
from collections.abc import Callable, Sequence
from functools import partial

from ddetr_d2.export import (
    LOADERS,
    WRITERS,
    ExportableDetector,
    compare,
    example_inputs,
    onnxruntime_extension,
    openvino_extension,
)
from ddetr_d2.export.verify import load_onnx, load_onnx_in_openvino
from ddetr_d2.modeling import SetDetector, prepare_for_inference

import torch
from torch import Tensor

from .cases import OURS, Case, Prepared
from .models import TOLERANCE, read_ours

# Inputs of ExportableDetector to its outputs.
Form = Callable[..., Sequence[Tensor]]


def _write(model: SetDetector, folder: str, format: str, sampling: str) -> str:
    path = f"{folder}/{format}_{sampling}.pt2"
    if not os.path.exists(path):
        WRITERS[format](ExportableDetector(model, sampling=sampling), path, {})
    return path


def _onnxruntime(model: SetDetector, folder: str) -> Form:
    return LOADERS["onnx"](_write(model, folder, "onnx", "grid_sample"))[0]


def _onnxruntime_with_extension(model: SetDetector, folder: str) -> Form:
    extension = f"{folder}/onnxruntime_extension.so"
    if not os.path.exists(extension):
        onnxruntime_extension.build(extension)
    return load_onnx(_write(model, folder, "onnx", "extension"), extension)[0]


def _openvino(model: SetDetector, folder: str, precision: str) -> Form:
    import openvino  # noqa: F401  where it is missing, this form is left out

    path = _write(model, folder, "onnx", "grid_sample")
    return load_onnx_in_openvino(path, precision=precision)[0]


def _openvino_with_extension(model: SetDetector, folder: str, precision: str) -> Form:
    import openvino  # noqa: F401

    extension = f"{folder}/openvino_extension.so"
    if not os.path.exists(extension):
        openvino_extension.build(extension)
    path = _write(model, folder, "onnx", "extension")
    return load_onnx_in_openvino(path, extension, precision)[0]


def _torchscript(model: SetDetector, folder: str) -> Form:
    return LOADERS["torchscript"](_write(model, folder, "torchscript", "grid_sample"))[0]


def _compiled(model: SetDetector, folder: str) -> Form:
    return torch.compile(
        LOADERS["torch_export"](_write(model, folder, "torch_export", "operator"))[0]
    )


FORMS: dict[str, Callable[[SetDetector, str], Form]] = {
    "onnxruntime": _onnxruntime,
    "onnxruntime, extension": _onnxruntime_with_extension,
    "OpenVINO": partial(_openvino, precision="f32"),
    "OpenVINO, extension": partial(_openvino_with_extension, precision="f32"),
    "OpenVINO, bfloat16": partial(_openvino, precision="bf16"),
    "OpenVINO, extension, bfloat16": partial(_openvino_with_extension, precision="bf16"),
    "TorchScript": _torchscript,
    "torch.export, compiled": _compiled,
}


def prepare_model(folder: str, size: tuple[int, int]) -> Prepared:
    """The model from ``prepare_for_inference``."""
    model = read_ours(folder, "cpu").build()
    images, *_ = example_inputs(ExportableDetector(model), size)
    model = prepare_for_inference(model)

    def run() -> list[dict]:
        with torch.inference_mode():
            return model([{"image": images[0]}])

    return Prepared(run)


def prepare_form(folder: str, size: tuple[int, int], name: str) -> Prepared:
    """One of :data:`FORMS`; its difference is the largest of a score, or of a box relative to the
    image."""
    model = read_ours(folder, "cpu").build()
    exact = ExportableDetector(model, sampling="operator")
    inputs = example_inputs(exact, size)
    form = FORMS[name](model, folder)

    def run() -> Sequence[Tensor]:
        with torch.no_grad():
            return form(*inputs)

    tolerance = float("inf") if "bfloat16" in name else TOLERANCE
    return Prepared(run, lambda: max(compare(exact, form, inputs)), tolerance)


def cases(folder: str, sizes: Sequence[tuple[int, int]], quick: bool):
    """One image.

    Args:
        folder: of the model.
        sizes: height and width of images.
        quick: leave out what a compiler works at for a minute.
    """
    for size in sizes:
        make: dict[str, Callable[[], Prepared]] = {OURS: partial(prepare_model, folder, size)}
        for name in FORMS:
            if not (quick and ("compiled" in name or "extension" in name)):
                make[name] = partial(prepare_form, folder, size, name)
        yield Case(f"{size[0]}x{size[1]}", make, seconds=14 * size[0] * size[1] / 852800)
