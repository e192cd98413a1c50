"""Pictures of what the detector does."""

from .detections import draw_detections
from .drawing import SamplingPanel, draw_sampling
from .heat_map import HeatMap
from .labels import set_label_fonts
from .recorder import AttentionRecorder, check_pixel
from .sampling import SamplingPoints

__all__ = [
    "AttentionRecorder",
    "HeatMap",
    "SamplingPanel",
    "SamplingPoints",
    "check_pixel",
    "draw_detections",
    "draw_sampling",
    "set_label_fonts",
]
