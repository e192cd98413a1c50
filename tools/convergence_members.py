"""The detectors that can be compared, as options on top of ``configs/convergence.yaml``."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ddetr_d2.errors import UserError, nearest

_NODE = "MODEL.DEFORMABLE_DETR."
_ONE_LEVEL = {f"{_NODE}IN_FEATURES": ["res4"], f"{_NODE}NUM_FEATURE_LEVELS": 1}
_REFINE = {f"{_NODE}WITH_BOX_REFINE": True}
_ONE_POINT = {f"{_NODE}ENC_POINTS": 1, f"{_NODE}DEC_POINTS": 1}
_OWN_LEVEL = {f"{_NODE}MULTI_SCALE_ATTENTION": False}


@dataclass(frozen=True)
class Member:
    """One detector.

    Attributes:
        label: what tables and pictures call it.
        options: configuration keys and values.
        rate_of: the member whose learning rate it takes over; empty for a search of its own.
        rate: learning rate where there is no search: what one has found (docs/convergence.md).
        is_baseline: it trains for more iterations than the others.
    """

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    rate_of: str = ""
    rate: float = 0.001
    is_baseline: bool = False


MEMBERS = {
    "detr": Member(
        "DETR", {"MODEL.META_ARCHITECTURE": "DETR"} | _ONE_LEVEL, rate=0.0003, is_baseline=True
    ),
    "deformable-single-scale": Member("Deformable DETR, single scale", _ONE_LEVEL),
    "deformable": Member("Deformable DETR"),
    "deformable-refine": Member("+ box refinement", _REFINE),
    "deformable-two-stage": Member("++ two-stage", _REFINE | {f"{_NODE}TWO_STAGE": True}),
    "deformable-no-ms-attention-k1": Member(
        "several levels, each to itself, K = 1", _OWN_LEVEL | _ONE_POINT, "deformable"
    ),
    "deformable-no-ms-attention": Member(
        "several levels, each to itself, K = 4", _OWN_LEVEL, "deformable"
    ),
    "deformable-k1": Member("K = 1", _ONE_POINT, "deformable"),
    "deformable-k2": Member(
        "K = 2", {f"{_NODE}ENC_POINTS": 2, f"{_NODE}DEC_POINTS": 2}, "deformable"
    ),
    "deformable-levels-2": Member("2 levels", {f"{_NODE}NUM_FEATURE_LEVELS": 2}, "deformable"),
}
DEFAULT = (
    "detr",
    "deformable-single-scale",
    "deformable",
    "deformable-refine",
    "deformable-two-stage",
)
# Table 2 of the Deformable DETR paper, and between its numbers.
ABLATION = (
    "deformable-single-scale",
    "deformable-no-ms-attention-k1",
    "deformable-no-ms-attention",
    "deformable-k1",
    "deformable-k2",
    "deformable-levels-2",
    "deformable",
)


def check_members(names: Sequence[str]) -> None:
    """See that there is a member of each name.

    Raises:
        UserError: if not, or one is named twice.
    """
    for name in names:
        if name not in MEMBERS:
            hint = nearest(name, MEMBERS) or "."
            raise UserError(f"no member is called {name!r}{hint} There are: {', '.join(MEMBERS)}.")
        if names.count(name) > 1:
            raise UserError(f"{name} is named twice.")
