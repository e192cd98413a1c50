"""Detectors as files for other programs: ONNX, TorchScript, torch.export."""

from .detector import SAMPLINGS, ExportableDetector
from .formats import OPSETS, WRITERS, example_inputs, export_program
from .metadata import describe
from .verify import LOADERS, Differences, compare

__all__ = [
    "LOADERS",
    "OPSETS",
    "SAMPLINGS",
    "WRITERS",
    "Differences",
    "ExportableDetector",
    "compare",
    "describe",
    "example_inputs",
    "export_program",
]
