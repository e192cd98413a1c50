"""What is in data sets: numbers, comparisons and warnings, for people and for programs."""

from .comparison import DataReport, compare_classes, report_on
from .data_set import DataSetReport, Role, describe
from .duplicates import DuplicateImages, find_duplicates
from .text import full_text, short_report

__all__ = [
    "DataReport",
    "DataSetReport",
    "DuplicateImages",
    "Role",
    "compare_classes",
    "describe",
    "find_duplicates",
    "full_text",
    "report_on",
    "short_report",
]
