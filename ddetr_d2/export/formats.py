"""Writing exported detectors."""

import contextlib
import importlib.util
import json
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode

from ..errors import UserError
from ..layers.deform_conv import DeformConv
from .detector import ExportableDetector
from .sampling import ONNX_DOMAIN

# ONNX operator sets: GridSample, and LayerNormalization one later, came with the first two; the
# last one is that of the exporter.
OPSETS = range(16, 21)
METADATA_FILE = "metadata.json"

_NEEDS_STANDARD = (
    "sampling {!r} is not for {}: the file would hold an operator that only ddetr_d2 has; "
    "choose grid_sample or gather."
)


def example_inputs(detector: ExportableDetector, *sizes: tuple[int, int]) -> tuple[Tensor, ...]:
    """Inputs of a detector: images of noise of these (height, width), padded to one size.

    They are the same in every call. Boxes are wanted in pixels of pictures twice as large.
    """
    device = detector.model.device
    shape = [max(lengths) for lengths in zip(*sizes, strict=True)]
    images = torch.zeros(len(sizes), 3, *shape, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    for image, (height, width) in zip(images, sizes, strict=True):
        image[:, :height, :width].random_(256, generator=generator)
    image_sizes = torch.tensor(sizes)
    inputs: tuple[Tensor, ...] = (images, image_sizes)
    if not detector.preprocess:
        inputs = detector.prepare(images.to(device), image_sizes.to(device))
    if detector.postprocess:
        inputs = (*inputs, 2 * image_sizes)
    return tuple(tensor.to(device) for tensor in inputs)


def write_onnx(
    detector: ExportableDetector, path: str, metadata: dict[str, Any], opset: int = 17
) -> None:
    """Write an ONNX file; the values of ``metadata`` become JSON in its ``metadata_props``.

    The exporter that starts from a trace is used: PyTorch's newer one knows no operator set below
    18, and takes minutes for this model.

    Raises:
        UserError: the operator set is not supported, the backbone has deformable convolutions, or
            the package onnx is missing.
    """
    if opset not in OPSETS:
        raise UserError(
            f"ONNX operator set {opset} is not supported; choose {OPSETS[0]} to {OPSETS[-1]}."
        )
    require_package("onnx", "the format onnx")
    import onnx

    if detector.sampling == "operator":
        raise UserError(_NEEDS_STANDARD.format(detector.sampling, "ONNX"))
    if any(isinstance(module, DeformConv) for module in detector.modules()):
        raise UserError(
            "the backbone has deformable convolutions, which are not exported to ONNX; choose "
            "torchscript or torch_export."
        )
    inputs = _small_batch(detector)
    with _tracing():
        torch.onnx.export(
            detector,
            inputs,
            path,
            input_names=detector.input_names,
            output_names=detector.output_names,
            dynamic_axes=_names_of_axes(detector),
            opset_version=opset,
            custom_opsets={ONNX_DOMAIN: 1} if detector.sampling == "extension" else None,
            dynamo=False,
        )
    model = onnx.load(path)
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=json.dumps(value))
    onnx.checker.check_model(model)
    onnx.save(model, path)


def write_torchscript(detector: ExportableDetector, path: str, metadata: dict[str, Any]) -> None:
    """Trace the detector; the file holds ``metadata`` as JSON in the extra file METADATA_FILE.

    Raises:
        UserError: the detector samples with an operator that TorchScript does not have.
    """
    if detector.sampling in ("operator", "extension"):
        raise UserError(_NEEDS_STANDARD.format(detector.sampling, "TorchScript"))
    with _tracing():
        traced = torch.jit.trace(detector, _small_batch(detector), check_trace=False)
        torch.jit.save(traced, path, _extra_files={METADATA_FILE: json.dumps(metadata)})


def write_torch_export(detector: ExportableDetector, path: str, metadata: dict[str, Any]) -> None:
    """Write what :func:`export_program` makes; ``metadata`` as in :func:`write_torchscript`."""
    program = export_program(detector)
    with warnings.catch_warnings():
        # Weights that share memory: of no concern, they are written whole.
        warnings.filterwarnings("ignore", "No complete tensor found")
        torch.export.save(program, path, extra_files={METADATA_FILE: json.dumps(metadata)})


def export_program(detector: ExportableDetector) -> ExportedProgram:
    """``torch.export`` of the detector, with any number of images of any size.

    Images must be larger than the stride of the coarsest level, which then has two pixels a side:
    torch.export treats sizes of one specially.

    Raises:
        UserError: the backbone takes images of certain sizes only, the detector samples with the
            operator of an extension, or PyTorch is older than 2.11.
    """
    if detector.sampling == "extension":
        raise UserError("sampling 'extension' is for ONNX; choose grid_sample, gather or operator.")
    # Of feature maps with channels last torch 2.10 takes sizes for constants.
    if torch.__version__ < "2.11":
        raise UserError(
            f"torch.export of a detector needs torch 2.11 or newer, this is {torch.__version__}; "
            "choose onnx or torchscript."
        )
    divisor = detector.model.backbone.size_divisibility
    if divisor > 1:
        raise UserError(
            "torch.export is not supported for this backbone, which takes images whose size is a "
            f"multiple of {divisor}; choose onnx or torchscript."
        )
    smallest = detector.coarsest_stride + 1
    batch, height, width = Dim("batch"), Dim("height", min=smallest), Dim("width", min=smallest)
    symbols = {"batch": batch, "height": height, "width": width}
    axes = _names_of_axes(detector)
    shapes = tuple(
        {axis: symbols[symbol] for axis, symbol in axes[name].items()}
        for name in detector.input_names
    )
    sizes = (smallest + 62, smallest + 94), (smallest + 30, smallest + 61), (smallest, smallest)
    with torch.no_grad(), _MaxPoolingOfAnySize():
        return torch.export.export(
            detector, example_inputs(detector, *sizes), dynamic_shapes=shapes
        )


class _MaxPoolingOfAnySize(TorchFunctionMode):
    """Writes maximum pooling as maxima of windows, while a program is exported.

    PyTorch computes the output size of its own from whether a division leaves a remainder, which
    would bind the program to images of one parity.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        function = _max_pool2d if func is F.max_pool2d else func
        return function(*args, **(kwargs or {}))


def _max_pool2d(
    x: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: int = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Tensor:
    """``F.max_pool2d``, which is called itself for anything but plain square windows."""
    lengths = kernel_size, stride, padding
    if dilation != 1 or ceil_mode or return_indices or not all(type(x) is int for x in lengths):
        usual: Any = F.max_pool2d
        return usual(x, *lengths, dilation, ceil_mode, return_indices)
    x = F.pad(x, (padding,) * 4, value=-math.inf)
    for axis in (2, 3):
        x = x.unfold(axis, kernel_size, stride).amax(-1)
    return x


WRITERS: dict[str, Callable[..., None]] = {
    "onnx": write_onnx,
    "torchscript": write_torchscript,
    "torch_export": write_torch_export,
}


def require_package(package: str, what: str) -> None:
    """Raise a :class:`UserError` with the remedy if an optional package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{what} needs the package {package}: pip install {package}")


def _small_batch(detector: ExportableDetector) -> tuple[Tensor, ...]:
    """Inputs to trace with; what is traced works with other numbers and sizes of images."""
    return example_inputs(detector, (160, 200), (130, 224))


def _names_of_axes(detector: ExportableDetector) -> dict[str, dict[int, str]]:
    """Axes whose size varies, with their names, for every input and output."""
    axes = {name: {0: "batch"} for name in (*detector.input_names, *detector.output_names)}
    axes["images"] |= {2: "height", 3: "width"}
    if not detector.preprocess:
        axes["padding_mask"] |= {1: "height", 2: "width"}
    for name in detector.output_names:
        axes[name][1] = "detections" if detector.postprocess else "queries"
    return axes


@contextlib.contextmanager
def _tracing() -> Iterator[None]:
    """No gradients, and no warnings of checks that a trace leaves out."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
