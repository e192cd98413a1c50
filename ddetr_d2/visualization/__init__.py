"""Pictures of what the detector does."""

from .drawing import SamplingPanel, draw_sampling
from .labels import set_label_fonts
from .sampling import SamplingPoints, SamplingRecorder, check_pixel

__all__ = [
    "SamplingPanel",
    "SamplingPoints",
    "SamplingRecorder",
    "check_pixel",
    "draw_sampling",
    "set_label_fonts",
]
