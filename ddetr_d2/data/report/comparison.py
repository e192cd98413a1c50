"""Several data sets side by side: training sets and the sets that are tested on."""

from collections.abc import Sequence
from dataclasses import dataclass

from detectron2.config import CfgNode

from ...class_names import match_classes
from ..coco import CocoAnnotations
from .data_set import DataSetReport, describe
from .duplicates import DuplicateImages, find_duplicates


@dataclass
class ClassDifference:
    """Classes, by name, that a training and a test set do not have in common."""

    training: str
    test: str
    only_in_training: list[str]
    only_in_test: list[str]


@dataclass
class SharedImages:
    """Images that are in a training set and in a test set, told by the content of the files.

    ``examples`` are pairs of files, at most ten.
    """

    training: str
    test: str
    test_images: int
    examples: list[tuple[str, str]]


@dataclass
class DataReport:
    """What is in the data sets of a training; ``dataclasses.asdict`` fits JSON.

    Attributes:
        data_sets: the training sets, then the test sets.
        repeated_images: files of each data set that repeat another one of it.
        shared_images: for each pair of sets that share some.
        class_differences: for each pair of sets that differ.
        duplicates: all image files that are the same.
    """

    data_sets: list[DataSetReport]
    repeated_images: dict[str, int]
    shared_images: list[SharedImages]
    class_differences: list[ClassDifference]
    duplicates: DuplicateImages


def report_on(
    training: Sequence[CocoAnnotations], test: Sequence[CocoAnnotations], cfg: CfgNode
) -> DataReport:
    """Report on data sets, whose names differ.

    Args:
        training: the sets that are trained on.
        test: the sets that are evaluated on.
        cfg: see :func:`describe`.
    """
    duplicates = duplicate_images(training, test, only_shared=False)
    return DataReport(
        data_sets=[
            *(describe(annotations, cfg, "training") for annotations in training),
            *(describe(annotations, cfg, "test") for annotations in test),
        ],
        repeated_images={a.source.name: duplicates.repeated_in(a.source.name) for a in training}
        | {a.source.name: duplicates.repeated_in(a.source.name) for a in test},
        shared_images=shared_images(training, test, duplicates),
        class_differences=compare_classes(training, test),
        duplicates=duplicates,
    )


def duplicate_images(
    training: Sequence[CocoAnnotations], test: Sequence[CocoAnnotations], *, only_shared: bool
) -> DuplicateImages:
    """The image files of the data sets that are the same byte by byte.

    Args:
        training: the sets that are trained on.
        test: the sets that are evaluated on.
        only_shared: only those of a training and a test set, which is faster.
    """
    paths = {a.source.name: [image.path for image in a.images] for a in (*training, *test)}
    between = [a.source.name for a in training], [a.source.name for a in test]
    return find_duplicates(paths, between if only_shared else None)


def shared_images(
    training: Sequence[CocoAnnotations],
    test: Sequence[CocoAnnotations],
    duplicates: DuplicateImages,
) -> list[SharedImages]:
    """For each training and test set the images that both have; none for sets that have none."""
    found = []
    for a in training:
        for b in test:
            pairs = duplicates.shared(a.source.name, b.source.name)
            if a.source.name == b.source.name:  # the same set, whose files are no duplicates
                pairs = [(image.path, image.path) for image in a.images]
            if pairs:
                shared = SharedImages(a.source.name, b.source.name, len(pairs), pairs[:10])
                found.append(shared)
    return found


def compare_classes(
    training: Sequence[CocoAnnotations], test: Sequence[CocoAnnotations]
) -> list[ClassDifference]:
    """For each training and test set the classes that only one of them has, matched by name."""
    found = []
    for a in training:
        for b in test:
            ours, theirs = list(a.categories.values()), list(b.categories.values())
            only_ours, only_theirs = (
                [
                    n
                    for n, match in zip(one, match_classes(one, other), strict=True)
                    if match is None
                ]
                for one, other in ((ours, theirs), (theirs, ours))
            )
            if only_ours or only_theirs:
                found.append(ClassDifference(a.source.name, b.source.name, only_ours, only_theirs))
    return found
