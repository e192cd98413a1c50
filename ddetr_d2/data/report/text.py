"""Reports on data sets as text: tables for the terminal, and a few lines for the log."""

import os
import textwrap
from collections.abc import Callable, Iterable, Sequence

from tabulate import tabulate

from ..coco import CocoAnnotations
from ..coco.suspicions import find_suspicious
from ..wording import agreeing, counted
from .comparison import (
    ClassDifference,
    DataReport,
    SharedImages,
    duplicate_images,
    shared_images,
)
from .data_set import (
    TINY,
    ClassReport,
    CocoSizes,
    DataSetReport,
    Distribution,
    count_sizes,
)

_WIDTH = 100
_MOST_CLASSES = 40
_MOST_NAME = 40


def full_text(report: DataReport) -> str:
    """The whole report, at most 100 columns wide but for file names."""
    parts = [_overview(report.data_sets), *map(_data_set, report.data_sets)]
    parts.append(_comparison(report))
    return "\n\n".join(part for part in parts if part)


def short_report(
    training: Sequence[CocoAnnotations], test: Sequence[CocoAnnotations] = ()
) -> list[str]:
    """A few lines for the log at the start of a training.

    For each set one line of counts, then what is suspicious, and images that are in a training
    set and in a test set; lines of these two kinds begin with "warning: ".

    Args:
        training: the sets that are trained on.
        test: the sets that are evaluated on; a set may be both.
    """
    sets = list({a.source.name: a for a in (*training, *test)}.values())
    lines = [_counts(annotations) for annotations in sets]
    for annotations in sets:
        name = annotations.source.name
        lines += [f"warning: {name}: {sentence}." for sentence in find_suspicious(annotations)]
    duplicates = duplicate_images(training, test, only_shared=True)
    shared = shared_images(training, test, duplicates)
    return lines + [f"warning: {_shared(images)}." for images in shared]


def _counts(annotations: CocoAnnotations) -> str:
    per_image = annotations.objects_per_image()
    sizes = count_sizes(annotations.areas[~annotations.crowd])
    parts = [
        f"{annotations.source.name}: {counted(len(per_image), 'image')}",
        f"{counted(int(per_image.sum()), 'box', 'boxes')} ({_sizes_in_words(sizes)})",
        counted(len(annotations.categories), "class", "classes"),
    ]
    further = (
        (int((per_image == 0).sum()), "image without boxes", "images without boxes"),
        (int(annotations.crowd.sum()), "crowd", "crowds"),
        (
            sum(left.count for left in annotations.left_out.values()),
            "box left out",
            "boxes left out",
        ),
    )
    parts += [counted(count, one, many) for count, one, many in further if count]
    return ", ".join(parts)


def _sizes_in_words(sizes: CocoSizes) -> str:
    return f"{sizes.small:,} small, {sizes.medium:,} medium, {sizes.large:,} large"


def _overview(data_sets: Sequence[DataSetReport]) -> str:
    # Two labels may be the same.
    rows: list[tuple[str, Callable[[DataSetReport], str]]] = [
        ("used for", lambda r: r.role),
        ("images", lambda r: f"{r.images:,}"),
        ("  without objects", lambda r: f"{r.images_without_objects:,}"),
        ("boxes in the file", lambda r: f"{r.annotations:,}"),
        ("  left out", lambda r: f"{sum(left.count for left in r.left_out.values()):,}"),
        ("  of crowds", lambda r: f"{r.crowds:,}"),
        ("objects", lambda r: f"{r.objects:,}"),
        ("  small (area below 32 x 32)", lambda r: _part(r.sizes.small, r.objects)),
        ("  medium", lambda r: _part(r.sizes.medium, r.objects)),
        ("  large (from 96 x 96)", lambda r: _part(r.sizes.large, r.objects)),
        ("  beyond the image's borders", lambda r: f"{r.objects_beyond_image:,}"),
        ("  repeated", lambda r: f"{r.repeated_objects:,}"),
        ("classes", lambda r: f"{len(r.classes):,}"),
        ("  without objects", lambda r: f"{sum(not c.objects for c in r.classes):,}"),
        ("objects in an image, median", lambda r: f"{r.objects_per_image.median:g}"),
        ("  most", lambda r: f"{r.objects_per_image.most:,.0f}"),
        ("object queries", lambda r: f"{r.object_queries:,}"),
        ("  images with more objects", lambda r: f"{r.images_over_queries:,}"),
        ("detections kept in an image", lambda r: f"{r.detections_per_image:,}"),
        ("  images with more objects", lambda r: f"{r.images_over_detections:,}"),
    ]
    return tabulate(
        [[label, *map(value, data_sets)] for label, value in rows],
        headers=["", *(_shortened(r.name, 20) for r in data_sets)],
        colalign=["left", *["right"] * len(data_sets)],
        disable_numparse=True,
        preserve_whitespace=True,
    )


def _part(count: int, total: int) -> str:
    return f"{count:,} ({count / total:.0%})" if total else "0"


def _data_set(report: DataSetReport) -> str:
    lines = [
        _heading(f"{report.name} ({report.role})"),
        f"{report.json_file}, images in {report.image_root}",
        "",
        _class_table(report.classes),
        "",
        _resize_table(report),
    ]
    if report.left_out:
        lines += ["", "Boxes left out of training and evaluation:"]
        lines += _bullets(
            f"{left.count:,} {agreeing(left.count, reason)}; the first: {left.first}"
            for reason, left in report.left_out.items()
        )
    if report.changes:
        lines += ["", "Corrected in reading the file:"]
        lines += _bullets(f"{change}: {count:,}" for change, count in report.changes.items())
    limits = _limits(report)
    if limits:
        lines += ["", "Beyond the limits of the configuration:", *_bullets(limits)]
    lines += ["", "Suspicious:" if report.suspicions else "Suspicious: nothing."]
    lines += _bullets(report.suspicions)
    return "\n".join(lines)


def _limits(report: DataSetReport) -> list[str]:
    most = f"the most objects in one is {report.objects_per_image.most:,.0f}"
    found = []
    if report.images_over_queries:
        found.append(
            f"{counted(report.images_over_queries, 'image')} with more objects than object queries "
            f"({report.object_queries}), {most}: raise MODEL.DEFORMABLE_DETR.NUM_QUERIES"
        )
    if report.images_over_detections and report.role == "test":
        found.append(
            f"{counted(report.images_over_detections, 'image')} with more objects than detections "
            f"are kept ({report.detections_per_image}), {most}; the others count as missed: raise "
            "TEST.DETECTIONS_PER_IMAGE"
        )
    return found


def _class_table(classes: Sequence[ClassReport]) -> str:
    shown = sorted(classes, key=lambda c: -c.objects)
    hidden = shown[_MOST_CLASSES - 10 : -10] if len(shown) > _MOST_CLASSES else []
    rows = [
        [c.id, _shortened(c.name, _MOST_NAME)]
        + [f"{n:,}" for n in (c.objects, c.images, c.sizes.small, c.sizes.medium, c.sizes.large)]
        for c in shown
    ]
    if hidden:
        between = f"... {len(hidden)} classes of {hidden[-1].objects:,} to {hidden[0].objects:,}"
        rows[_MOST_CLASSES - 10 : -10] = [["", between, "", "", "", "", ""]]
    return tabulate(
        rows,
        headers=["id", "class", "objects", "images", "small", "medium", "large"],
        colalign=["right", "left", *["right"] * 5],
        disable_numparse=True,
    )


def _resize_table(report: DataSetReport) -> str:
    resize = report.resize
    low, high = resize.shortest_sides
    if not resize.shortest:
        title = "Images are not resized."
    else:
        several = f" (configured: {low} to {high})" if low != high else ""
        title = (
            f"After the resize to a shortest side of {resize.shortest}{several}, "
            f"at most {resize.longest} pixels:"
        )
    rows: dict[str, Distribution | None] = {
        "width of images": resize.image_width,
        "height of images": resize.image_height,
        "width / height of images": resize.image_aspect,
        "size of objects, sqrt(width x height)": resize.object_size,
        "width / height of objects": resize.object_aspect,
    }
    table = tabulate(
        [
            [label, *(f"{value:.4g}" for value in vars(values).values())]
            for label, values in rows.items()
            if values is not None
        ],
        headers=["", "least", "5%", "median", "95%", "most"],
        colalign=["left", *["right"] * 5],
        disable_numparse=True,
    )
    tiny = f"Objects with a side below {TINY} pixels: {_part(resize.tiny_objects, report.objects)}"
    return "\n".join([title, table, tiny])


def _comparison(report: DataReport) -> str:
    lines = [_heading("Images with the same content")]
    found = [
        f"{name}: {_repeated(count)}" for name, count in report.repeated_images.items() if count
    ]
    found += map(_shared, report.shared_images)
    if report.duplicates.unchecked:
        found.append(f"{counted(report.duplicates.unchecked, 'file')} could not be looked at")
    lines += _bullets(found) or ["None."]
    if any(r.role == "test" for r in report.data_sets) and any(
        r.role == "training" for r in report.data_sets
    ):
        lines += ["", _heading("Classes of training and test sets")]
        lines += _bullets(map(_difference, report.class_differences)) or ["The same."]
    return "\n".join(lines)


def _repeated(count: int) -> str:
    return (
        f"{counted(count, 'image repeats', 'images repeat')} the content of another one of the set"
    )


def _shared(shared: SharedImages) -> str:
    if shared.training == shared.test:
        return f"{shared.test} is trained on and tested on: its AP tells nothing of other images"
    ours, theirs = shared.examples[0]
    example = (
        theirs
        if os.path.realpath(ours) == os.path.realpath(theirs)
        else f"{theirs}, which is {ours} there"
    )
    return (
        f"{counted(shared.test_images, 'image')} of {shared.test} (test) "
        f"{'is' if shared.test_images == 1 else 'are'} in {shared.training} (training) as well, "
        f"such as {example}: the AP on seen images is too high. Take them out of one of the two"
    )


def _difference(difference: ClassDifference) -> str:
    parts = [
        f"{counted(len(names), 'class', 'classes')} only in {name}: "
        + ", ".join(names[:10])
        + (", ..." if len(names) > 10 else "")
        for name, names in (
            (difference.training, difference.only_in_training),
            (difference.test, difference.only_in_test),
        )
        if names
    ]
    return "; ".join(parts)


def _heading(text: str) -> str:
    return f"{text}\n{'=' * min(len(text), _WIDTH)}"


def _bullets(sentences: Iterable[str]) -> list[str]:
    return [
        textwrap.fill(
            sentence,
            _WIDTH,
            initial_indent="- ",
            subsequent_indent="  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
        for sentence in sentences
    ]


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."
